"""The stand-in for a device's disk: what the update machine asks of it is answered from memory.

It remembers which blobs and which blocks are there, not the bytes of files: the machine has checked them by their
digests before it hands them over. It survives a reboot of its device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kedge.simulator.releases import RUNTIME
from kedge_agent.update import actions, events
from kedge_agent.update.actions import Action
from kedge_protocol import digest
from kedge_protocol.bitmaps import bit_is_set
from kedge_protocol.blocks import BLOCK_SIZE, HASH_SIZE, block_count
from kedge_protocol.bundle.layout import Bundle

MEMORY_BYTES = 4 << 30


@dataclass
class _Partial:
    """A blob under way: its block map and its finished blocks."""

    hashes: bytes
    have: bytearray


class SimulatedDisk:
    """The disk of one device.

    Args:
        free_bytes: room for further blobs.
    """

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes
        self.memory = actions.PersistentState()
        self.current: dict[str, Bundle] = {}
        """Model → bundle of its current slot."""
        self.previous: dict[str, Bundle] = {}
        self.assembled: dict[str, Bundle] = {}
        """Digest → bundle with a slot."""
        self._blobs: dict[str, bytes | None] = {}
        self._maps: dict[str, bytes] = {}
        self._partials: dict[str, _Partial] = {}
        self._handlers: dict[type, Callable[[Any], events.Event | None]] = {
            actions.OpenBlob: self._open,
            actions.WriteBlock: self._write,
            actions.FinishBlob: self._finish,
            actions.StoreBlob: self._store,
            actions.CloseBlob: lambda _: None,
            actions.Measure: self._measure,
            actions.Assemble: self._assemble,
            actions.Switch: self._switch,
            actions.RollBack: self._roll_back,
            actions.Remove: self._remove,
            actions.CollectGarbage: self._collect,
            actions.Remember: self._remember,
        }

    def install(self, model: str, bundle: Bundle, maps: Mapping[str, bytes], memory: actions.PersistentState) -> None:
        """Put a bundle with its block maps on the disk, as if it had been rolled out before."""
        self.current[model] = bundle
        self.memory = memory
        self._blobs |= {bundle.digest: bundle.raw, bundle.manifest.config.digest: bundle.config_raw}
        self._blobs |= {layer.digest: None for layer in bundle.manifest.layers}
        self._maps |= {layer.digest: maps[layer.digest] for layer in bundle.manifest.layers}

    def installed(self) -> dict[str, events.Installed]:
        """Return what the slots hold."""
        return {model: self._installed(model) for model in self.current}

    def do(self, action: Action) -> events.Event | None:
        """Perform an action; return its outcome, if it has one."""
        return self._handlers[type(action)](action)

    def _installed(self, model: str) -> events.Installed:
        now, before = self.current.get(model), self.previous.get(model)
        return events.Installed(
            current=now.digest if now else None,
            version=now.config.version if now else None,
            previous=before.digest if before else None,
        )

    def _open(self, action: actions.OpenBlob) -> events.Event:
        if action.digest in self._blobs:
            data = self._blobs[action.digest] if action.read else None
            return events.BlobOpened(digest=action.digest, complete=True, data=data)
        if action.map_digest is None:
            return events.BlobOpened(digest=action.digest)
        if action.block_map is not None:
            if digest.of_bytes(action.block_map) != action.map_digest:
                return events.BlobOpened(digest=action.digest, error="the block map has another digest")
            self._maps[action.digest] = action.block_map
        hashes = self._maps.get(action.digest)
        if hashes is None:
            return events.BlobOpened(digest=action.digest)
        partial = self._partials.get(action.digest)
        if partial is None:
            partial = self._partials[action.digest] = _Partial(hashes, self._known_blocks(hashes, action.size))
        return events.BlobOpened(digest=action.digest, block_map=hashes, have=bytes(partial.have))

    def _known_blocks(self, hashes: bytes, size: int) -> bytearray:
        """Return the bitmap of the blocks that another stored blob holds."""
        known: set[bytes] = set()
        for blob, other in self._maps.items():
            if blob in self._blobs:
                known |= {other[at : at + HASH_SIZE] for at in range(0, len(other), HASH_SIZE)}
        have = bytearray((block_count(size) + 7) // 8)
        for index in range(block_count(size)):
            if hashes[index * HASH_SIZE : (index + 1) * HASH_SIZE] in known:
                have[index >> 3] |= 1 << (index & 7)
        return have

    def _write(self, action: actions.WriteBlock) -> events.Event | None:
        partial = self._partials.get(action.digest)
        if partial is None:
            return None
        if self._used() + len(action.payload) > self.free_bytes:
            del self._partials[action.digest]
            return events.WriteFailed(action.digest, f"block {action.index} cannot be written: no space left on device")
        partial.have[action.index >> 3] |= 1 << (action.index & 7)
        return None

    def _used(self) -> int:
        return sum(BLOCK_SIZE * int.from_bytes(one.have, "little").bit_count() for one in self._partials.values())

    def _finish(self, action: actions.FinishBlob) -> events.Event:
        partial = self._partials.pop(action.digest, None)
        count = 0 if partial is None else len(partial.hashes) // HASH_SIZE
        if partial is None or not all(bit_is_set(partial.have, index) for index in range(count)):
            return events.BlobStored(action.digest, "blocks are missing")
        self._blobs[action.digest] = None
        return events.BlobStored(action.digest)

    def _store(self, action: actions.StoreBlob) -> events.Event:
        # Documents are read again; files are not.
        self._blobs[action.digest] = action.data if action.data[:1] == b"{" else None
        return events.BlobStored(action.digest)

    def _measure(self, action: actions.Measure) -> events.Event:
        layers = {layer.digest: layer.size for layer in action.bundle.manifest.layers}
        return events.Measured(
            model=action.model,
            digest=action.bundle.digest,
            missing_bytes=sum(size for name, size in layers.items() if name not in self._blobs),
            free_bytes=self.free_bytes,
            memory_bytes=MEMORY_BYTES,
            runtimes={RUNTIME: "1.0"},
        )

    def _assemble(self, action: actions.Assemble) -> events.Event:
        self.assembled[action.bundle.digest] = action.bundle
        return events.Assembled(action.model, action.bundle.digest)

    def _switch(self, action: actions.Switch) -> events.Event:
        before = self.current.get(action.model)
        if before is not None and before.digest != action.bundle.digest:
            self.previous[action.model] = before
        self.current[action.model] = action.bundle
        return events.Switched(action.model, self._installed(action.model))

    def _roll_back(self, action: actions.RollBack) -> events.Event:
        before = self.previous.pop(action.model, None)
        if before is None:
            self.current.pop(action.model, None)
        else:
            self.current[action.model] = before
        return events.Switched(action.model, self._installed(action.model))

    def _remove(self, action: actions.Remove) -> events.Event:
        self.current.pop(action.model, None)
        self.previous.pop(action.model, None)
        return events.Switched(action.model, events.Installed())

    def _collect(self, action: actions.CollectGarbage) -> None:
        kept = set(action.keep)
        for bundle in (*self.current.values(), *self.previous.values()):
            kept |= {bundle.digest, bundle.manifest.config.digest}
            kept |= {layer.digest for layer in bundle.manifest.layers}
        self.assembled = {name: one for name, one in self.assembled.items() if name in kept}
        self._blobs = {name: data for name, data in self._blobs.items() if name in kept}
        self._maps = {name: data for name, data in self._maps.items() if name in kept}
        self._partials = {name: one for name, one in self._partials.items() if name in kept}

    def _remember(self, action: actions.Remember) -> None:
        self.memory = action.memory

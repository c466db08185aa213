"""Room in memory for another version of a model: where both do not fit, the old one makes way before the new one is
loaded. A device that runs out of memory ends whichever process the kernel picks, and nobody is there to look."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from kedge_agent.slots import ModelFolder, Serving, model_folders
from kedge_protocol import memory
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import IncompatibleError, InputError

DECLARED = "memory_bytes"
"""The figure by which a loaded language model reports the memory that its bundle declares."""
SWITCH_SECONDS = 300.0
"""How long a version's answers go on after a switch, and before it makes way."""
_BARE = 100 << 20
"""Bytes of a serving process beside its models: 107 MiB were measured, 139 with a tokenizer (docs/benchmarks.md)."""
_LOOK = 0.25
"""Seconds between two looks at whether the old version has gone."""
_FREED = 3.0
"""Seconds after which what has gone is back with the system."""


class Room:
    """What this device's memory has room for.

    Args:
        state: the agent's state folder.
        limit_bytes: what the agent and its children may take together; 0 for what the device has.
    """

    def __init__(self, state: Path, limit_bytes: int = 0) -> None:
        self._state = state
        self._limit = limit_bytes

    def total(self) -> int:
        """Return the bytes that there are for the agent and its children."""
        there = memory.of_device().total
        return min(there, self._limit) if self._limit else there

    def free(self) -> int:
        """Return the bytes that another model may take: what is available, less what the served language models declare
        and have not taken yet, as their caches fill with use."""
        served = [one for folder in model_folders(self._state) if (one := folder.serving()) is not None]
        held = sum(memory.resident(pid) or 0 for pid in {one.pid for one in served})
        declared = sum(int(one.figures.get(DECLARED, 0)) for one in served if memory.resident(one.pid))
        available = memory.of_device().available
        if self._limit:
            available = min(available, self._limit - held - (memory.resident() or 0))
        return available - _promised(declared, held)

    def make(
        self,
        folder: ModelFolder,
        config: BundleConfig,
        on_progress: Callable[[str], None],
        *,
        beside: bool = False,
    ) -> None:
        """Make room for a bundle: if it does not fit beside the version that the serving process has, that one ends its
        answers within :data:`SWITCH_SECONDS` and is let go, until :meth:`ModelFolder.take_back`.

        Args:
            on_progress: called with a description while it waits.
            beside: whether both are to run (a shadow): then nothing makes way.

        Raises:
            IncompatibleError: it does not fit, or does not either without the old version; the message gives the
                numbers.
        """
        needed = config.resources.memory_bytes
        if needed <= self.free() or not self.total():
            return
        current, served = folder.current(), folder.serving()
        if beside or current is None or served is None or served.error is not None or served.digest != current.digest:
            self._require(needed, config)
        elif needed > self.free() + (old := current.bundle().config).resources.memory_bytes:
            self._require(needed, config, f", and version {old.version} would give back {_mib(old)}")
        else:
            folder.give_way(current.digest)
            until, words = time.monotonic() + SWITCH_SECONDS + _FREED, f"version {old.version} makes way in memory"
            while not _gone(folder.serving()) and time.monotonic() < until:
                on_progress(words)
                time.sleep(_LOOK)
            until = time.monotonic() + _FREED
            while needed > self.free() and time.monotonic() < until:
                time.sleep(_LOOK)
            self._require(needed, config, f" without version {old.version}")

    def _require(self, needed: int, config: BundleConfig, more: str = "") -> None:
        free = self.free()
        if needed > free:
            raise IncompatibleError(
                f"needs {_mib(config)} of memory; {max(0, free) >> 20} MiB of {self.total() >> 20} MiB are free for "
                f"it{more}",
                where=f"{config.name} {config.version}",
                remedy="Stop what takes the memory, or compile a language model with a shorter --context, fewer "
                "--slots or --cache int8; then roll out again",
            )


def admit(config: BundleConfig) -> None:
    """Refuse a bundle that the system would end this process for, when its caches fill.

    Raises:
        InputError: it needs more memory than the device has.
    """
    needed, there = config.resources.memory_bytes, memory.of_device().total
    if there and needed > there:
        raise InputError(
            f"the bundle needs {needed >> 20} MiB of memory, the device has {there >> 20} MiB",
            where=config.name,
            remedy="Compile it with a shorter --context, fewer --slots or --cache int8",
        )


def fits_beside(config: BundleConfig, old: BundleConfig) -> bool:
    """Return whether a bundle fits into memory while this process holds another, which may take what it declares."""
    device = memory.of_device()
    if not device.total or old.generation is None:
        promised = 0
    else:
        promised = _promised(old.resources.memory_bytes, memory.resident() or 0)
    return not device.total or config.resources.memory_bytes <= device.available - promised


def _promised(declared: int, held: int) -> int:
    """Return what language models in a process may still take of what they declare."""
    return max(0, declared - max(0, held - _BARE))


def _gone(served: Serving | None) -> bool:
    return served is None or served.error is not None or memory.resident(served.pid) is None


def _mib(config: BundleConfig) -> str:
    return f"{config.resources.memory_bytes / (1 << 20):.0f} MiB"

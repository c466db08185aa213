"""A loaded part after the first: it computes its layers for the devices with the earlier ones."""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_agent.room import DECLARED, SWITCH_SECONDS
from kedge_agent.serving.settings import listening_socket
from kedge_agent.split import link
from kedge_agent.split.link import Hello, RemoteStage, Reply, Step
from kedge_agent.split.settings import SplitSettings
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.errors import ConfigError, InputError, KedgeError, MessageError
from kedge_targets import registry
from kedge_targets.decoder.stages import Stage

Array = npt.NDArray[Any]

log = logging.getLogger("kedge.split")

LINGER_SECONDS = 600.0
"""Seconds that a part which was replaced goes on for the connections it has: the device before it may switch later."""


class PartHolder:
    """The layers of one bundle, for as many sequences as it was compiled for.

    Args:
        folder: the folder with the bundle's files, named by title.

    Raises:
        ConfigError: this device does not listen for others, or knows no device with the layers after these.
        VerificationError: the runtime refuses the file.
    """

    one = None

    def __init__(self, folder: Path, bundle: Bundle, settings: SplitSettings) -> None:
        config, spec = bundle.config, bundle.config.generation
        if spec is None or spec.part is None:
            raise InputError("is no part of a model", where=config.name)
        if settings.listen is None:
            raise ConfigError(
                "holds layers for another device, and this one listens for none",
                where=config.name,
                remedy="Set listen in [split] of agent.toml",
            )
        self.digest = bundle.digest
        self.words = f"{config.name} {config.version}, {spec.part.words}"
        self.detail = spec.part.words
        self.figures: Mapping[str, float] = {DECLARED: config.resources.memory_bytes}
        self._part, self._spec, self._settings = spec.part, spec, settings
        self._next = None if spec.part.following is None else settings.after(config.name)
        self._make = registry.runtime(config.backend).load_stage(folder / config.entry, config.runtime_options)
        self._free = spec.slots
        self._changed = threading.Condition()
        self._until, self._makes_room = math.inf, False
        listener_of(settings).add(self)

    def serve(self, connection: socket.socket, hello: Hello) -> None:
        """Compute for one connection until it ends.

        Raises:
            OSError: the other end closed or vanished.
            KedgeError: what it asks for cannot be done.
        """
        with self._opened(hello.slots) as stages:
            windows = {window for stage in stages for window in stage.windows}
            link.send(connection, Reply(windows=tuple(windows)))
            most = hello.slots * self._spec.context * self._part.channels * 4
            while not self._over(connection):
                step, raw = link.receive(connection, Step, most)
                link.send(connection, Reply(), self._computed(stages, step, raw, slots=hello.slots))

    def _over(self, connection: socket.socket) -> bool:
        """Wait for the next step; return whether none is taken any more."""
        while time.monotonic() < self._until:
            if link.readable(connection, self._settings.seconds):
                return False
            if self._makes_room and self._until < math.inf:
                break
        return True

    def _computed(self, stages: Sequence[Stage], step: Step, raw: bytes, *, slots: int) -> bytes:
        context, shape = self._spec.context, (len(step.lengths), step.step, self._part.channels)
        if not 0 < shape[0] <= slots - max(step.first, 0) or step.first < 0 or not 0 < step.keep <= step.step:
            raise MessageError("a step of other slots than there are")
        if min(step.lengths) < 0 or max(step.lengths) + step.step > context or len(raw) != 4 * math.prod(shape):
            raise MessageError("a step beyond the context")
        for one in step.copies:
            if not (0 <= one.source < slots and 0 <= one.to < slots and 0 <= one.positions <= context):
                raise MessageError("a copy of other slots than there are")
            for stage in stages:
                stage.copy(one.source, one.to, one.positions)
        values: Array = np.frombuffer(raw, "<f4").reshape(shape)
        lengths = np.array(step.lengths, np.int64)
        for stage in stages:
            values = stage.run(step.first, values, lengths, step.keep if stage is stages[-1] else step.step)
        return np.ascontiguousarray(values, "<f4").tobytes()

    @contextlib.contextmanager
    def _opened(self, slots: int) -> Iterator[Sequence[Stage]]:
        """Reserve caches for a connection."""
        if not 1 <= slots <= self._spec.slots:
            raise MessageError(f"{self.words} has {self._spec.slots} sequences, {slots} are asked for")
        with self._changed:
            # A connection that was lost a moment ago still has its own.
            if not self._changed.wait_for(lambda: self._free >= slots, self._settings.seconds / 2):
                raise InputError(f"{self.words} has no room for {slots} sequences: others use it")
            self._free -= slots
        with contextlib.ExitStack() as opened:
            opened.callback(self._give_back, slots)
            stages = [opened.enter_context(contextlib.closing(self._make(slots, self._spec.context)))]
            if self._next is not None:
                beyond = Hello(bundle=self._part.following or "", slots=slots)
                remote = RemoteStage(self._settings, self._next, beyond, channels=self._part.channels)
                stages.append(opened.enter_context(contextlib.closing(remote)))
                remote.ready()
            yield stages

    def _give_back(self, slots: int) -> None:
        with self._changed:
            self._free += slots
            self._changed.notify_all()

    def make_room(self) -> None:
        """Do not linger once closed: memory has no room for this part and the one that follows it."""
        self._makes_room = True

    def close(self) -> None:
        """Take no more connections, and end those there are after :data:`LINGER_SECONDS`. To make room, each ends as
        soon as it is quiet for as long as a device may say nothing."""
        listener_of(self._settings).remove(self)
        self._until = time.monotonic() + (SWITCH_SECONDS if self._makes_room else LINGER_SECONDS)

    def __call__(self, *given: object) -> Any:
        """Refuse: a part answers the device before it, nobody else."""
        raise self.refusal()

    in_order = run = __call__

    def refusal(self) -> InputError:
        """Return the error of a call."""
        return InputError("writes nothing by itself", where=self.words, remedy="Ask the device with the first part")


class Listener:
    """Listens for devices with earlier layers, for all parts of this process.

    Raises:
        ConfigError: the process cannot listen there.
    """

    def __init__(self, settings: SplitSettings) -> None:
        self._settings = settings
        self._context = settings.server_context()
        self._holders: dict[str, PartHolder] = {}
        self._socket = listening_socket(settings.listen or "")
        threading.Thread(target=self._accept, name="kedge-split", daemon=True).start()
        log.info("computes layers for other devices at %s", settings.listen)

    def add(self, holder: PartHolder) -> None:
        """Offer a part."""
        self._holders[holder.digest] = holder

    def remove(self, holder: PartHolder) -> None:
        """Offer it no longer."""
        if self._holders.get(holder.digest) is holder:
            del self._holders[holder.digest]

    def _accept(self) -> None:
        while True:
            plain, address = self._socket.accept()
            threading.Thread(target=self._meet, args=(plain, address), name="kedge-split-link", daemon=True).start()

    def _meet(self, connection: socket.socket, address: Any) -> None:
        try:
            connection = link.prepared(connection, self._context, self._settings.seconds, server=True)
            hello, _ = link.receive(connection, Hello)
            holder = self._holders.get(hello.bundle)
            if holder is None:
                there = "; ".join(f"{one.words} ({digest[:19]})" for digest, one in list(self._holders.items()))
                raise InputError(f"it does not hold the bundle {hello.bundle[:19]}; it holds {there or 'none'}")
            holder.serve(connection, hello)
        except KedgeError as error:
            log.warning("the link from %s ended: %s", address[0], error)
            with contextlib.suppress(OSError):
                link.send(connection, Reply(error=str(error)[:1000]))
        except OSError as error:
            log.info("the link from %s ended: %s", address[0], error)
        finally:
            connection.close()


_LISTENERS: dict[str, Listener] = {}
_LOCK = threading.Lock()


def listener_of(settings: SplitSettings) -> Listener:
    """Return this process's listener; it begins with the first part that is loaded.

    Raises:
        ConfigError: see :class:`Listener`.
    """
    address = settings.listen or ""
    with _LOCK:
        if address not in _LISTENERS:
            _LISTENERS[address] = Listener(settings)
        return _LISTENERS[address]

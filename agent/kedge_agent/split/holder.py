"""A loaded part after the first: it computes its layers for the devices with the earlier ones."""

from __future__ import annotations

import contextlib
import logging
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
from kedge_agent.split.link import Hello, RemoteStage, Welcome
from kedge_agent.split.settings import SplitSettings
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.errors import ConfigError, InputError, KedgeError, MessageError
from kedge_targets import registry
from kedge_targets.decoder.stages import Stage

Array = npt.NDArray[Any]

log = logging.getLogger("kedge.split")

LINGER_SECONDS = 600.0
"""Seconds that a part which was replaced goes on for the connections it has: the device before it may switch later."""
_LOOK_SECONDS = 0.25


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
        self._part, self._context, self._settings = spec.part, spec.context, settings
        self._next = None if spec.part.following is None else following(settings, config.name)
        self._make = registry.runtime(config.backend).load_stage(folder / config.entry, config.runtime_options)
        self._left = spec.slots * spec.context
        self._changed = threading.Condition()
        self._used: dict[socket.socket, float] = {}
        """Connection → time of its last step (monotonic clock)."""
        self._closed = False
        self._makes_room = False
        listener_of(settings).add(self)

    def serve(self, connection: socket.socket, hello: Hello) -> None:
        """Compute for one connection until it ends; errors are told to the other end."""
        welcomed = False
        try:
            with self._opened(connection, hello) as stages:
                link.send_document(connection, Welcome())
                welcomed = True
                connection.settimeout(None)
                while True:
                    self._step(connection, stages, hello, link.receive(connection, link.STEP.size))
                    self._used[connection] = time.monotonic()
        except KedgeError as error:
            log.warning("%s: %s", self.words, error)
            raw = str(error).encode()[:1000]
            if not welcomed:
                link.send_document(connection, Welcome(error=str(error)[:1000]))
            else:
                connection.sendall(link.REPLY.pack(link.FAILED, len(raw)) + raw)

    def _step(self, connection: socket.socket, stages: Sequence[Stage], hello: Hello, head: bytes) -> None:
        kind, first, rows, step, keep = link.STEP.unpack(head)
        if kind == link.COPY:
            if max(first, rows) >= hello.slots or step > hello.context:
                raise MessageError("a copy of other slots than there are")
            for stage in stages:
                stage.copy(first, rows, step)
            return
        if kind != link.RUN or not 0 < rows <= hello.slots - first or not 0 < keep <= step <= hello.context:
            raise MessageError("a step of other slots than there are")
        lengths = np.frombuffer(link.receive(connection, rows * 8), "<i8").astype(np.int64)
        if lengths.min() < 0 or lengths.max() + step > hello.context:
            raise MessageError("a step beyond the context")
        raw = link.receive(connection, rows * step * self._part.channels * 4)
        values = np.frombuffer(raw, "<f4").reshape(rows, step, self._part.channels)
        for stage in stages:
            values = stage.run(first, values, lengths, keep if stage is stages[-1] else step)
        answer = np.ascontiguousarray(values, "<f4").tobytes()
        connection.sendall(link.REPLY.pack(link.DONE, len(answer)) + answer)

    @contextlib.contextmanager
    def _opened(self, connection: socket.socket, hello: Hello) -> Iterator[Sequence[Stage]]:
        """Reserve caches for a connection."""
        wanted = hello.slots * hello.context
        if hello.slots < 1 or not 0 < hello.context <= self._context:
            raise MessageError(f"{hello.slots} sequences of {hello.context} positions cannot be had")
        with self._changed:
            # A connection that was lost a moment ago still has its own.
            self._changed.wait_for(lambda: self._left >= wanted or self._closed, self._settings.seconds / 2)
            if self._closed or self._left < wanted:
                raise InputError(f"{self.words} has no room for {hello.slots} sequences: others use it")
            self._left -= wanted
            self._used[connection] = time.monotonic()
        stages: list[Stage] = []
        try:
            stages.append(self._make(hello.slots, hello.context))
            if self._next is not None:
                beyond = Hello(bundle=self._part.following or "", slots=hello.slots, context=hello.context)
                stages.append(RemoteStage(self._settings, self._next, beyond, channels=self._part.channels))
                stages[-1].ready()
            yield stages
        finally:
            for stage in stages:
                stage.close()
            with self._changed:
                self._left += wanted
                self._used.pop(connection, None)
                self._changed.notify_all()

    def make_room(self) -> None:
        """Do not linger once closed: memory has no room for this part and the one that follows it."""
        self._makes_room = True

    def close(self) -> None:
        """Take no more connections, and end those there are after :data:`LINGER_SECONDS`. To make room, each ends as
        soon as it is quiet for as long as a device may say nothing."""
        listener_of(self._settings).remove(self)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._used:
                threading.Thread(target=self._linger, name="kedge-split-end", daemon=True).start()

    def _linger(self) -> None:
        until = time.monotonic() + (SWITCH_SECONDS if self._makes_room else LINGER_SECONDS)
        with self._changed:
            while self._used:
                now = time.monotonic()
                for connection, used in self._used.items():
                    if now > until or (self._makes_room and now - used > self._settings.seconds):
                        with contextlib.suppress(OSError):
                            connection.shutdown(socket.SHUT_RDWR)
                self._changed.wait(_LOOK_SECONDS if self._makes_room else max(until - now, _LOOK_SECONDS))

    def __call__(self, *given: object) -> Any:
        """Refuse: a part answers the device before it, nobody else."""
        raise self.refusal()

    in_order = run = __call__

    def refusal(self) -> InputError:
        """Return the error of a call."""
        return InputError("writes nothing by itself", where=self.words, remedy="Ask the device with the first part")


def following(settings: SplitSettings, model: str) -> str:
    """Return the address of the device with the layers after those of a model on this device.

    Raises:
        ConfigError: none is named.
    """
    address = settings.following.get(model)
    if address is None:
        raise ConfigError(
            "goes on at another device, and none is named",
            where=model,
            remedy=f'Give its address in [split.next] of agent.toml: {model} = "HOST:PORT"',
        )
    return address


class Listener:
    """Listens for devices with earlier layers, for all parts of this process.

    Raises:
        ConfigError: the process cannot listen there.
    """

    def __init__(self, settings: SplitSettings) -> None:
        self._settings = settings
        self._context = settings.context(server=True)
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

    def _meet(self, plain: socket.socket, address: Any) -> None:
        connection = plain
        try:
            connection = link.prepared(plain, self._settings.seconds)
            if self._context is not None:
                connection = self._context.wrap_socket(connection, server_side=True)
            hello = link.receive_document(connection, Hello)
            holder = self._holders.get(hello.bundle)
            if holder is None:
                there = "; ".join(f"{one.words} ({digest[:19]})" for digest, one in list(self._holders.items()))
                error = f"it does not hold the bundle {hello.bundle[:19]}; it holds {there or 'none'}"
                link.send_document(connection, Welcome(error=error))
                return
            holder.serve(connection, hello)
        except (OSError, KedgeError) as error:
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

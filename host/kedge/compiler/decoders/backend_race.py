"""Chooses between the backends of a target by the pace of the packed decoder: the same exchange on each, in turns."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from kedge.compiler.decoders.worker_messages import BackendPace, DecoderRequest
from kedge.evaluation import latency_race
from kedge_targets import registry
from kedge_targets.decoder.contract import LoweredDecoder
from kedge_targets.decoder.session import DecoderSession

READ, WRITTEN = 64, 32
"""Tokens of an exchange, of each slot."""
SECONDS = 20.0
"""About how long is measured."""
ROUNDS = 5
"""Exchanges of a decoder that is measured alone."""


def measured(
    packed: Mapping[str, tuple[LoweredDecoder, DecoderRequest]],
    tokens: Sequence[int],
    *,
    context: int,
    heard: Callable[[], None],
) -> list[BackendPace]:
    """Measure an exchange on each backend: every slot reads a prompt, then all slots write together.

    Args:
        packed: files and request of each backend.
        tokens: of a text; repeated where they are few.
        context: positions of a slot.
        heard: called before each is opened.

    Returns:
        The pace of each backend, relative to the first.
    """
    with contextlib.ExitStack() as opened:
        exchanges = {}
        for name, (lowered, request) in packed.items():
            heard()
            exchanges[name] = opened.enter_context(_exchange(lowered, request, tokens, context=context))
        if len(exchanges) == 1:
            one = next(iter(exchanges.values()))
            one.run()
            one.run()
            return [one.pace(name, None) for name in exchanges]
        calls: list[Callable[[], object]] = [one.run for one in exchanges.values()]
        made = latency_race.race(calls, seconds=SECONDS)
        return [one.pace(name, calls.pace(made[0])) for (name, one), calls in zip(exchanges.items(), made, strict=True)]


def alone(lowered: LoweredDecoder, request: DecoderRequest, tokens: Sequence[int], *, context: int) -> BackendPace:
    """Measure the exchange of a single slot; see :func:`measured`."""
    with _exchange(lowered, replace(request, slots=1), tokens, context=context) as exchange:
        for _ in range(ROUNDS):
            exchange.run()
        return exchange.pace(request.backend, None)


@contextlib.contextmanager
def _exchange(
    lowered: LoweredDecoder, request: DecoderRequest, tokens: Sequence[int], *, context: int
) -> Iterator[_Exchange]:
    """Open a decoder for exchanges."""
    read, written = min(READ, context // 2), min(WRITTEN, context // 2)
    prompt = np.resize(np.asarray(tokens, np.int64), read).tolist()
    session = registry.runtime(request.backend).load_decoder(
        lowered.files[lowered.entry], request.options, slots=request.slots, context=read + written
    )
    with contextlib.closing(session):
        yield _Exchange(session, prompt, written)


def fastest(paces: Sequence[BackendPace]) -> BackendPace:
    """Return the backend with the shortest exchange."""
    return min(paces, key=lambda one: one.ratio)


class _Exchange:
    """One exchange of a session, which notes how long each half took by the clock, in seconds."""

    def __init__(self, session: DecoderSession, prompt: Sequence[int], written: int) -> None:
        self._session = session
        self._prompt = prompt
        self._written = written
        self.reading: list[float] = []
        self.writing: list[float] = []

    def run(self) -> None:
        session = self._session
        began = time.perf_counter()
        for slot in range(session.slots):
            session.truncate(slot, 0)
        tokens = {slot: int(session.extend(slot, self._prompt)[0].argmax()) for slot in range(session.slots)}
        self.reading.append(time.perf_counter() - began)
        began = time.perf_counter()
        for _ in range(self._written):
            tokens = {slot: int(logits.argmax()) for slot, logits in session.step(tokens).items()}
        self.writing.append(time.perf_counter() - began)

    def pace(self, backend: str, relative: latency_race.RelativeLatency | None) -> BackendPace:
        """Return the pace of all exchanges so far.

        Args:
            relative: to the first backend; None where there is no other.
        """
        slots = self._session.slots
        found = BackendPace(
            backend=backend,
            read_per_second=slots * len(self._prompt) / min(self.reading),
            written_per_second=slots * self._written / min(self.writing),
        )
        if relative is None:
            return found
        return replace(found, ratio=relative.ratio, low=relative.low, high=relative.high, busy=relative.busy)

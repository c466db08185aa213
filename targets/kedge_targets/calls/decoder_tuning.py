"""Compares the ways of running a decoder on this device.

A way is judged by the geometric mean of two times: of a token that is written, and of a token of a prompt that is read.
One thread runs a decoder, so a way's number of calls at once does not matter, and ways with equal threads are one.
"""

from __future__ import annotations

import itertools
import logging
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kedge_protocol import golden
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import KedgeError
from kedge_targets import registry
from kedge_targets.calls import plan as plans
from kedge_targets.calls.plan import CallPlan, Measured
from kedge_targets.contract import Way
from kedge_targets.decoder import golden as decoders
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.worker.progress import Progress

log = logging.getLogger(__name__)

_SECONDS = 10.0
"""Seconds after which no other way is measured."""
_READ = 64
"""Tokens of the prompt that is read."""
_WRITTEN = 12
"""Tokens that are written for a measurement."""
_ROUNDS = 3


class DecoderTuning:
    """The comparison for one bundle.

    Args:
        options: with which the decoder is loaded where nothing is chosen.
    """

    def __init__(self, folder: Path, config: BundleConfig, options: Mapping[str, Any], progress: Progress) -> None:
        self._folder = folder
        self._config = config
        self._options = options
        self._progress = progress
        self._context = sys.maxsize if config.generation is None else config.generation.context
        self._vectors = golden.load(folder / config.golden.file)
        self._tokens, self._columns, self._sources = decoders.inputs(self._vectors, where=config.golden.file)

    def chosen(self, ways: Sequence[Way]) -> CallPlan | None:
        """Return the plan; None where there is nothing to choose.

        Raises:
            KedgeError: the runtime refuses the file.
        """
        measured = list(self._measured(ways))
        if not measured:
            return None
        sound = [one for one, holds in measured if holds]
        return plans.chosen([one for one, _ in measured], sound.__contains__)

    def _measured(self, ways: Sequence[Way]) -> Iterator[tuple[Measured, bool]]:
        ends = time.monotonic() + _SECONDS
        for number, way in enumerate(ways):
            self._progress("ways of writing", number, len(ways))
            if number and time.monotonic() > ends:
                return
            try:
                session = self._session(way.options)
            except KedgeError as error:
                log.info("%s: %s", self._config.name, error)
                continue
            try:
                found = decoders.answers(session, self._tokens, self._columns, self._sources)
                holds = all(one.holds for one in golden.compare(self._vectors, found))
                read, written = self._seconds(session)
            finally:
                session.close()
            figures = {"alone_ms": written * 1000, "busy_ms": read * 1000}
            yield Measured(options=dict(way.options), calls=1, **figures), holds

    def _session(self, options: Mapping[str, Any]) -> DecoderSession:
        return registry.runtime(self._config.backend).load_decoder(
            self._folder / self._config.entry,
            {**self._options, **options},
            slots=1,
            context=min(self._context, max(self._tokens.shape[1], _READ + _WRITTEN)),
        )

    def _seconds(self, session: DecoderSession) -> tuple[float, float]:
        """Return the seconds of a token that is read, and of one that is written: the best of the rounds for what is
        read, the first quartile of what is written, as on a busy machine the longer ones have waited for others."""
        if self._sources is not None:
            session.attend(0, self._sources[0])
        # A rotary table ends with the model's context.
        count = min(_WRITTEN, session.context // 2)
        prompt = list(itertools.islice(itertools.cycle(self._tokens[0].tolist()), min(_READ, session.context - count)))
        read, written = [], []
        for _ in range(_ROUNDS):
            session.truncate(0, 0)
            begun = time.perf_counter()
            session.extend(0, prompt)
            read.append((time.perf_counter() - begun) / len(prompt))
            for token in itertools.islice(itertools.cycle(prompt), count):
                begun = time.perf_counter()
                session.step({0: token})
                written.append(time.perf_counter() - begun)
        return max(min(read), 1e-9), max(statistics.quantiles(written, n=4)[0], 1e-9)

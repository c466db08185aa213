"""Sums the devices' telemetry as it arrives, by bundle: what the gates of a rollout judge by.

A row is of one device, model and bundle, of bounded size, however long it covers: counts, minutes ("blocks") for the
dispersion, a histogram of latencies, and at most :data:`POINTS` values of memory. It begins anew when the device comes
back to a bundle, and the latest two bundles of a device's model are kept: the one that serves and the one before it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kedge.fleet.database import Row, Session
from kedge.fleet.drift import sane_counts
from kedge.fleet.staged.cohorts import Share, Spread
from kedge_protocol import drift as sketches
from kedge_protocol import latency_buckets
from kedge_protocol.messages import ModelTelemetry, ShadowTelemetry, Telemetry

BLOCK_SECONDS = 60.0
"""Seconds of telemetry that count as one block; calls within it are not taken to be independent."""
MAX_BLOCKS = 1440
"""Where there are more, all counts are halved, so that a day counts more than the days before it."""
POINTS = 32
"""Values of memory that are kept; where there are more, every other one is dropped and they lie twice as far apart."""
MAX_COUNT = 1 << 53
CLASSES, OTHER = 64, "other"
"""Classes of answers that are told apart, and the name of the others."""
KEPT = 2
"""Bundles of a device's model."""

_UPSERT = """
INSERT INTO call_figures (device_id, model, digest, since, until, edition, shadow, document)
VALUES (:device, :model, :digest, :since, :until, 1, :shadow, :document)
ON CONFLICT (device_id, model, digest) DO UPDATE SET since = excluded.since, until = excluded.until,
    edition = edition + 1, shadow = excluded.shadow, document = excluded.document
"""
_PRUNE = """
DELETE FROM call_figures WHERE device_id = :device AND model = :model AND digest NOT IN (
    SELECT digest FROM call_figures WHERE device_id = :device AND model = :model ORDER BY until DESC LIMIT :kept
)
"""


@dataclass(kw_only=True)
class Block:
    """What came since the last whole block.

    Attributes:
        at: when it began (seconds since 1970).
        p95, p99: sums of log milliseconds, each message by its calls.
        weight: the calls of those sums.
        buckets: latency histogram, where the device sends one; of a language model that of one token.
        first: of a language model, that of the times to the first token.
        temperature, memory: sums, with the number of their values.
    """

    at: float
    total: int = 0
    bad: int = 0
    p95: float = 0.0
    p99: float = 0.0
    weight: int = 0
    buckets: dict[str, int] = field(default_factory=dict)
    first: dict[str, int] = field(default_factory=dict)
    temperature: float = 0.0
    temperatures: int = 0
    memory: float = 0.0
    memories: int = 0


@dataclass(kw_only=True)
class ShadowFigures:
    """What a shadow answered beside the bundle of these figures.

    Attributes:
        digest: of the shadow; with another one all begins anew.
        compared: inputs that the shadow was shown; bad are those that it answered differently, or failed on.
        classes: class of the old answer → (compared, agreed).
        confidence_shift: sum of new less old.
        old_buckets, new_buckets: latencies of the same calls.
        errors: calls on which the shadow failed.
        total, bad: of the block that is not whole yet.
    """

    digest: str
    compared: Share = field(default_factory=Share)
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    confidence_shift: float = 0.0
    old_buckets: dict[str, int] = field(default_factory=dict)
    new_buckets: dict[str, int] = field(default_factory=dict)
    errors: int = 0
    total: int = 0
    bad: int = 0

    def add(self, told: ShadowTelemetry) -> None:
        """Add what an interval brought; what cannot be is left out."""
        if not (0 <= told.agreed <= told.compared < MAX_COUNT and 0 <= told.errors < MAX_COUNT):
            return
        self.total += told.compared + told.errors
        self.bad += told.compared - told.agreed + told.errors
        self.errors += told.errors
        if abs(told.confidence_shift) <= told.compared:
            self.confidence_shift += told.confidence_shift
        self.old_buckets = latency_buckets.added(self.old_buckets, told.old_buckets)
        self.new_buckets = latency_buckets.added(self.new_buckets, told.new_buckets)
        for name, pair in told.classes.items():
            if len(pair) != 2 or not 0 <= pair[1] <= pair[0] < MAX_COUNT:
                continue
            known = name if name in self.classes or len(self.classes) < CLASSES else OTHER
            before = self.classes.get(known, (0, 0))
            self.classes[known] = (before[0] + pair[0], before[1] + pair[1])

    @property
    def mean_shift(self) -> float | None:
        """The mean of new less old confidence; None without an input that both answered."""
        answered = self.compared.total + self.total - self.errors
        return self.confidence_shift / answered if answered > 0 else None

    def close(self) -> None:
        """End a block."""
        self.compared = self.compared.with_block(self.total, self.bad)
        self.total = self.bad = 0


@dataclass(kw_only=True)
class Figures:
    """The figures of one bundle on one device.

    Attributes:
        since, until: of the first and last message (seconds since 1970, by arrival).
        calls, p95, p99, first: see :class:`kedge.fleet.staged.cohorts.DeviceCalls`.
        temperature: °C, by blocks.
        buckets: latency histogram.
        drift: what the samples were like: stream → counts of its bins.
        shadow: what a shadow answered beside this bundle; None without one.
        memory: (seconds after ``since``, bytes), oldest first.
        every: blocks between two values of memory.
        skipped: blocks since the last value of memory.
        block: the block that is not whole yet.
    """

    since: float
    until: float
    calls: Share = field(default_factory=Share)
    p95: Spread = field(default_factory=Spread)
    p99: Spread = field(default_factory=Spread)
    first: Spread = field(default_factory=Spread)
    temperature: Spread = field(default_factory=Spread)
    buckets: dict[str, int] = field(default_factory=dict)
    drift: dict[str, list[int]] = field(default_factory=dict)
    shadow: ShadowFigures | None = None
    memory: list[tuple[float, float]] = field(default_factory=list)
    every: int = 1
    skipped: int = 0
    block: Block | None = None

    def add(self, at: float, message: Telemetry, model: ModelTelemetry, *, count: bool) -> None:
        """Add a message.

        Args:
            at: when it came.
            message, model: the message and its part of this model.
            count: whether its calls are all of this bundle.
        """
        if self.block is not None and at - self.block.at >= BLOCK_SECONDS:
            self._close(self.block)
        if self.block is None:
            self.block = Block(at=at)
        self.until = max(self.until, at)
        if count and not model.mixed:
            _add_calls(self.block, model)
            self.drift = sketches.added(self.drift, sane_counts(model.drift))
        if model.shadow is not None:
            if self.shadow is None or self.shadow.digest != model.shadow.digest:
                self.shadow = ShadowFigures(digest=model.shadow.digest)
            self.shadow.add(model.shadow)
        temperature = message.temperature_c
        if temperature is not None and -100 < temperature < 1000:
            self.block.temperature += temperature
            self.block.temperatures += 1
        memory = message.agent_bytes if model.memory_bytes is None else model.memory_bytes
        if 0 < memory < MAX_COUNT:
            self.block.memory += memory
            self.block.memories += 1

    def _close(self, block: Block) -> None:
        self.block = None
        self.calls = self.calls.with_block(block.total, block.bad)
        if block.buckets:
            self.buckets = latency_buckets.added(self.buckets, block.buckets)
            p95, p99 = latency_buckets.percentiles_ms(block.buckets, (0.95, 0.99))
            self.p95, self.p99 = _with_latency(self.p95, p95), _with_latency(self.p99, p99)
        elif block.weight:
            self.p95 = self.p95.with_value(block.p95 / block.weight)
            self.p99 = self.p99.with_value(block.p99 / block.weight)
        if block.first:
            (first,) = latency_buckets.percentiles_ms(block.first, (0.95,))
            self.first = _with_latency(self.first, first)
        if block.temperatures:
            self.temperature = self.temperature.with_value(block.temperature / block.temperatures)
        if self.shadow is not None:
            self.shadow.close()
        self.skipped += 1
        if block.memories and self.skipped >= self.every:
            self._note_memory(block.at - self.since, block.memory / block.memories)
        if self.calls.blocks > MAX_BLOCKS:
            self._halve()

    def _note_memory(self, seconds: float, value: float) -> None:
        self.skipped = 0
        self.memory.append((round(seconds, 1), round(value)))
        if len(self.memory) > POINTS:
            self.memory = self.memory[::2]
            self.every *= 2

    def _halve(self) -> None:
        calls = self.calls
        self.calls = Share(
            total=calls.total // 2, bad=calls.bad // 2, blocks=calls.blocks // 2, squares=calls.squares / 2
        )
        for name in ("p95", "p99", "first", "temperature"):
            spread: Spread = getattr(self, name)
            setattr(self, name, dataclasses.replace(spread, count=-(-spread.count // 2), squares=spread.squares / 2))
        self.buckets = {bucket: count // 2 for bucket, count in self.buckets.items() if count > 1}
        self.drift = {stream: [count // 2 for count in counts] for stream, counts in self.drift.items()}

    def encode(self) -> bytes:
        """Return the document of this row."""
        block = None if self.block is None else vars(self.block)
        values = {
            "calls": vars(self.calls),
            "p95": vars(self.p95),
            "p99": vars(self.p99),
            "first": vars(self.first),
            "temperature": vars(self.temperature),
            "buckets": self.buckets,
            "drift": self.drift,
            "shadow": None if self.shadow is None else vars(self.shadow) | {"compared": vars(self.shadow.compared)},
            "memory": self.memory,
            "every": self.every,
            "skipped": self.skipped,
            "block": block,
        }
        return json.dumps(values, separators=(",", ":")).encode()


def decode(since: float, until: float, document: bytes) -> Figures:
    """Read a row."""
    values = json.loads(document)
    return Figures(
        since=since,
        until=until,
        calls=Share(**values["calls"]),
        p95=Spread(**values["p95"]),
        p99=Spread(**values["p99"]),
        first=Spread(**values.get("first", {})),
        temperature=Spread(**values["temperature"]),
        buckets=values["buckets"],
        drift=values["drift"],
        shadow=read_shadow(values["shadow"]),
        memory=[(seconds, value) for seconds, value in values["memory"]],
        every=values["every"],
        skipped=values["skipped"],
        block=None if values["block"] is None else Block(**values["block"]),
    )


def read_shadow(values: Mapping[str, Any] | None) -> ShadowFigures | None:
    """Read a row's part of a shadow."""
    if values is None:
        return None
    classes = {name: (compared, agreed) for name, (compared, agreed) in values["classes"].items()}
    return ShadowFigures(**{**values, "compared": Share(**values["compared"]), "classes": classes})


def note(session: Session, messages: Mapping[int, Sequence[tuple[float, Telemetry]]]) -> None:
    """Add telemetry, in the caller's transaction.

    Args:
        messages: device number → its messages with their times of arrival, oldest first.
    """
    query = "SELECT * FROM call_figures WHERE device_id IN {} ORDER BY until"
    known: dict[tuple[int, str], dict[str, Row | Figures]] = {}
    for row in session.where_in(query, list(messages)):
        known.setdefault((row["device_id"], row["model"]), {})[row["digest"]] = row
    changed: set[tuple[int, str, str]] = set()
    grown: set[tuple[int, str]] = set()
    for device, some in messages.items():
        for at, message in some:
            for name, model in message.models.items():
                if model.digest is None:
                    continue
                bundles = known.setdefault((device, name), {})
                if next(reversed(bundles), None) != model.digest:
                    bundles.pop(model.digest, None)
                    bundles[model.digest] = Figures(since=at, until=at)
                    grown.add((device, name))
                figures = _opened(bundles, model.digest)
                # The first message after a switch counts calls of the bundle before, and the warm-up.
                figures.add(at, message, model, count=at > figures.since)
                changed.add((device, name, model.digest))
    _write(session, known, changed, grown)


def _opened(bundles: dict[str, Row | Figures], digest: str) -> Figures:
    """Decode a row when it is wanted: mostly that of the bundle that serves, not that of the one before."""
    found = bundles[digest]
    if not isinstance(found, Figures):
        found = bundles[digest] = decode(found["since"], found["until"], found["document"])
    return found


def _write(
    session: Session,
    known: Mapping[tuple[int, str], dict[str, Row | Figures]],
    changed: Iterable[tuple[int, str, str]],
    grown: Iterable[tuple[int, str]],
) -> None:
    rows = []
    for device, model, digest in changed:
        figures = _opened(known[device, model], digest)
        rows.append(
            {
                "device": device,
                "model": model,
                "digest": digest,
                "since": figures.since,
                "until": figures.until,
                "shadow": None if figures.shadow is None else figures.shadow.digest,
                "document": figures.encode(),
            }
        )
    session.run_many(_UPSERT, rows)
    session.run_many(_PRUNE, [{"device": device, "model": model, "kept": KEPT} for device, model in grown])


def _add_calls(block: Block, model: ModelTelemetry) -> None:
    answered, failed = model.inferences, model.errors
    if not (0 <= answered < MAX_COUNT and 0 <= failed < MAX_COUNT):
        return
    block.total += answered + failed
    block.bad += failed
    if model.generation is not None:
        # How long an answer takes depends on its length: one token's time and the first one's do not.
        block.buckets = latency_buckets.added(block.buckets, model.generation.token_buckets)
        block.first = latency_buckets.added(block.first, model.generation.first_token_buckets)
        return
    if model.latency_buckets:
        block.buckets = latency_buckets.added(block.buckets, model.latency_buckets)
    p95, p99 = (model.latency_ms.get(name, math.nan) for name in ("p95", "p99"))
    if answered and 0 < p95 < 1e9 and 0 < p99 < 1e9:
        block.p95 += answered * math.log(p95)
        block.p99 += answered * math.log(p99)
        block.weight += answered


def _with_latency(spread: Spread, milliseconds: float) -> Spread:
    return spread.with_value(math.log(milliseconds)) if milliseconds > 0 else spread

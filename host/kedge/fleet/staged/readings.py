"""What the gates read of the devices' figures, and a memory of it: between two looks most devices have sent nothing,
and what did not change is neither read nor reckoned again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from kedge.fleet import call_figures
from kedge.fleet.call_figures import Figures
from kedge.fleet.database import Row, Session
from kedge.fleet.staged.cohorts import DeviceCalls
from kedge.fleet.staged.slopes import MIN_SECONDS, WARM_UP_SECONDS, slope


@dataclass(frozen=True)
class Growth:
    """The growth of memory since a switch: bytes a minute (None: not measured for long enough), its variance, and the
    number of values behind it."""

    slope: float | None
    variance: float
    points: int


class Reading:
    """The figures of one bundle on one device.

    Args:
        device: its name.
        digest: of the bundle.
        figures: as they are stored.
    """

    def __init__(self, device: str, digest: str, figures: Figures) -> None:
        self.device = device
        self.digest = digest
        self.figures = figures

    @cached_property
    def calls(self) -> DeviceCalls:
        """Its calls."""
        one = self.figures
        buckets = {int(bucket): count for bucket, count in one.buckets.items()}
        return DeviceCalls(
            device=self.device, calls=one.calls, p95=one.p95, p99=one.p99, first=one.first, buckets=buckets
        )

    @property
    def temperature(self) -> float | None:
        """Its mean, in °C; None if not measured."""
        measured = self.figures.temperature
        return measured.mean if measured.count else None

    @property
    def measures_memory(self) -> bool:
        """Whether memory was measured at all."""
        block = self.figures.block
        return bool(self.figures.memory) or (block is not None and block.memories > 0)

    @cached_property
    def growth(self) -> Growth:
        """Growth since the switch, without the warm-up."""
        points = [point for point in self.figures.memory if point[0] >= WARM_UP_SECONDS]
        if not points or points[-1][0] - points[0][0] < MIN_SECONDS:
            return Growth(None, 0.0, len(points))
        return Growth(*slope(points), len(points))

    @cached_property
    def growth_before(self) -> float | None:
        """Growth of the bundle before, all of it."""
        return slope(self.figures.memory)[0]

    def follows(self, before: Reading) -> None:
        """Take over what is as it was in an earlier reading of the same figures."""
        if self.figures.memory == before.figures.memory:
            for name in ("growth", "growth_before"):
                if name in vars(before):
                    vars(self)[name] = vars(before)[name]


_DOCUMENT = """
SELECT name, document FROM call_figures JOIN device ON device.id = device_id
WHERE device_id = ? AND model = ? AND digest = ?
"""


@dataclass(frozen=True)
class _Known:
    """A reading, and which state of its row it is of."""

    since: float
    edition: int
    reading: Reading


class Readings:
    """Readings of a rollout, with those of the last look. They are of as many devices as a look reads, never of the
    whole fleet."""

    def __init__(self) -> None:
        self._before: dict[tuple[int, str], _Known] = {}
        self._now: dict[tuple[int, str], _Known] = {}

    def begin(self) -> None:
        """Begin a look: what the last one did not read is forgotten."""
        self._before, self._now = self._now, {}

    def read(self, session: Session, model: str, row: Row) -> Reading:
        """Return the reading of a row with ``device_id``, ``digest``, ``since``, ``until`` and ``edition``. Its
        document is read only if it is another one than at the last look."""
        key = (row["device_id"], row["digest"])
        known = self._now.get(key) or self._before.get(key)
        if known is None or (known.since, known.edition) != (row["since"], row["edition"]):
            name, document = session.rows(_DOCUMENT, (key[0], model, key[1]))[0]
            reading = Reading(name, key[1], call_figures.decode(row["since"], row["until"], document))
            if known is not None:
                reading.follows(known.reading)
            known = _Known(row["since"], row["edition"], reading)
        self._now[key] = known
        return known.reading

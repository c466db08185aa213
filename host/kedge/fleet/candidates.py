"""Decides which bundle of a release a device gets, where the release holds several for its target: by the figures of
devices that measured them, by those of an earlier release of the model, or, without figures, by measuring two."""

from __future__ import annotations

import enum
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kedge.fleet.database import Row, Session
from kedge.fleet.rollouts import Wanted
from kedge_protocol import candidates as rule

MEASURING = 4
"""Devices of a target that measure candidates of a release, at most."""

_LEAST_MS = 1e-6
_ROUNDS = 50
"""A device measures two candidates, and all pairs share one: the fit is a tree of few steps."""

_CANDIDATES = """
SELECT target, digest, size, backend, max_latency,
       (SELECT coalesce(sum(blob.size), 0) FROM bundle_blob JOIN blob ON blob.digest = bundle_blob.digest
        WHERE bundle_id = bundle.id) AS bytes
FROM bundle WHERE release_id = ? ORDER BY target, preference
"""
_LATENCIES = "SELECT device_id, bundle, target, p50_ms, p95_ms FROM latency WHERE bundle IN {}"
_REFUSED = "SELECT bundle, count(*) AS devices FROM refused_bundle WHERE bundle IN {} GROUP BY bundle"
_EARLIER = """
SELECT device_id, release.id, release.version, backend, p50_ms, p95_ms FROM release
JOIN bundle ON bundle.release_id = release.id AND bundle.target = :target
JOIN latency ON latency.bundle = bundle.digest AND latency.target = :target
WHERE release.name = :name AND release.id < :id ORDER BY release.id DESC
"""
_UNDER_WAY = """
SELECT assignment.state, assignment.rival, part.digest, count(*) AS devices FROM assignment
JOIN rollout_device AS part USING (rollout_id, device_id) JOIN rollout ON rollout.id = rollout_id
WHERE model = :name AND version = :version AND assignment.target = :target AND rival IS NOT NULL
  AND (superseded_by IS NULL OR assignment.state = 'measured') GROUP BY 1, 2, 3
"""


class Assigned(str, enum.Enum):
    """What a device in a rollout was given, of several bundles."""

    WAITING = "waiting"  # nothing yet: others of its target measure first
    MEASURING = "measuring"  # two, of which it keeps the better one
    REFUSED = "refused"  # two, and it could keep neither
    MEASURED = "measured"  # the one that it kept
    GIVEN = "given"  # one, without measuring


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A bundle of a target that has several.

    Attributes:
        wanted: the bundle.
        bytes: of all its blobs, as a device counts them (:attr:`~kedge_protocol.bundle.layout.Bundle.transfer_bytes`).
        max_ms: the latency that the release's budget allows; None for any.
    """

    wanted: Wanted
    backend: str
    bytes: int
    max_ms: float | None = None

    @property
    def digest(self) -> str:
        """The bundle's digest."""
        return self.wanted.digest


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What a call takes on a typical one of the devices that measured, in milliseconds; ``release`` is an earlier one's
    version, if it is of that."""

    p50_ms: float
    p95_ms: float
    devices: int
    release: str = ""

    def __str__(self) -> str:
        on = f"{self.devices} device{'s' * (self.devices != 1)}"
        return f"{self.p50_ms:.3g} ms on {on}" + (f" with {self.release}" if self.release else "")


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the candidates of one target.

    Attributes:
        figures: digest → what it takes.
        refused: digest → on how many devices it was refused.
        measuring: digest → how many devices measure it now.
        measurers: how many devices measure or have measured candidates.
        under_way: how many of them have not answered.
    """

    figures: Mapping[str, Figure] = field(default_factory=dict)
    refused: Mapping[str, int] = field(default_factory=dict)
    measuring: Mapping[str, int] = field(default_factory=dict)
    measurers: int = 0
    under_way: int = 0

    def is_refused(self, digest: str) -> bool:
        """Whether a candidate failed on more devices than it was measured on."""
        figure = self.figures.get(digest)
        proved = 0 if figure is None or figure.release else figure.devices
        return self.refused.get(digest, 0) > proved

    def told(self, candidates: Sequence[Candidate]) -> str:
        """Return the figures in words."""
        said = []
        for one in candidates:
            if self.is_refused(one.digest):
                said.append(f"{one.backend} was refused")
            elif (figure := self.figures.get(one.digest)) is not None:
                said.append(f"{one.backend} {figure}")
        return ", ".join(said)


@dataclass(frozen=True)
class Decision:
    """What a device is given, and why."""

    state: Assigned
    wanted: Wanted
    reason: str


def of_release(session: Session, release: int) -> dict[str, tuple[Candidate, ...]]:
    """Return target → the bundles of a release, in the compiler's order."""
    found: dict[str, tuple[Candidate, ...]] = {}
    for row in session.rows(_CANDIDATES, (release,)):
        one = Candidate(
            wanted=Wanted(row["digest"], row["size"]),
            backend=row["backend"],
            bytes=row["bytes"],
            max_ms=row["max_latency"],
        )
        found[row["target"]] = (*found.get(row["target"], ()), one)
    return found


def expected(session: Session, release: Row, targets: Mapping[int, str]) -> dict[int, tuple[str, ...]]:
    """Return the bundles that devices will have to pull: device's number → digests.

    Args:
        targets: device's number → its target, in the order in which they are told.
    """
    several = of_release(session, release["id"])
    found: dict[int, tuple[str, ...]] = {}
    for target in dict.fromkeys(targets.values()):
        numbers = [number for number, one in targets.items() if one == target]
        known = Evidence() if len(several[target]) == 1 else evidence(session, release, target, several[target])
        found |= {number: one.wanted.digests for number, one in decide(several[target], known, numbers).items()}
    return found


def best_of_release(session: Session, release: Row) -> dict[str, Wanted]:
    """Return target → the bundle that a device is given which measures nothing."""
    found = {}
    for target, several in of_release(session, release["id"]).items():
        known = Evidence() if len(several) == 1 else evidence(session, release, target, several)
        found[target] = _best(_alive(several, known), known).wanted
    return found


def evidence(session: Session, release: Row, target: str, several: Sequence[Candidate]) -> Evidence:
    """Return what the fleet knows of the candidates of one target.

    Figures are of these very bundles; where not all have some, those of the newest earlier release of the model of
    which each of these backends was measured stand for all.
    """
    digests = [one.digest for one in several]
    own = [row for row in session.where_in(_LATENCIES, digests) if row["target"] == target]
    figures = comparable([Timing.of_row(row, row["bundle"]) for row in own])
    if len(figures) < len(several):
        figures = _earlier(session, release, target, several) or figures
    under_way = session.rows(_UNDER_WAY, {"name": release["name"], "version": release["version"], "target": target})
    measuring: Counter[str] = Counter()
    for row in under_way:
        if row["state"] == Assigned.MEASURING.value:
            measuring.update({row["digest"]: row["devices"], row["rival"]: row["devices"]})
    return Evidence(
        figures=figures,
        refused={row["bundle"]: row["devices"] for row in session.where_in(_REFUSED, digests)},
        measuring=measuring,
        measurers=sum(row["devices"] for row in under_way),
        under_way=sum(row["devices"] for row in under_way if row["state"] == Assigned.MEASURING.value),
    )


@dataclass(frozen=True)
class Timing:
    """One measurement: ``of`` what on which device, milliseconds of a call."""

    device: int
    of: str
    p50_ms: float
    p95_ms: float

    @classmethod
    def of_row(cls, row: Row, of: str) -> Timing:
        """Return the measurement in a row of ``latency``."""
        return cls(row["device_id"], of, row["p50_ms"], row["p95_ms"])


def comparable(timings: Sequence[Timing], *, release: str = "") -> dict[str, Figure]:
    """Return what each candidate takes on a device of typical speed.

    Not every device measures every candidate, and one device may be slower than another. So the logarithm of a time is
    taken as the sum of the candidate's and the device's part, fitted by least squares, alternately (backfitting); what
    no device links is compared as it was measured.
    """
    logs = [(one.device, one.of, math.log(max(one.p50_ms, _LEAST_MS))) for one in timings]
    parts = _means((of, value) for _, of, value in logs)
    devices: dict[int, float] = {}
    for _ in range(_ROUNDS):
        devices = _means((device, value - parts[of]) for device, of, value in logs)
        parts = _means((of, value - devices[device]) for device, of, value in logs)
    typical = statistics.median(devices.values()) if devices else 0.0
    found = {}
    for of, part in parts.items():
        mine = [one for one in timings if one.of == of]
        p50 = math.exp(part + typical)
        spread = statistics.median(one.p95_ms / max(one.p50_ms, _LEAST_MS) for one in mine)
        found[of] = Figure(p50_ms=p50, p95_ms=p50 * max(1.0, spread), devices=len(mine), release=release)
    return found


_K = TypeVar("_K")


def _means(pairs: Iterable[tuple[_K, float]]) -> dict[_K, float]:
    found: dict[_K, list[float]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return {key: statistics.fmean(values) for key, values in found.items()}


def _earlier(session: Session, release: Row, target: str, several: Sequence[Candidate]) -> dict[str, Figure]:
    by_release: dict[str, list[Timing]] = {}
    for row in session.rows(_EARLIER, {"name": release["name"], "id": release["id"], "target": target}):
        by_release.setdefault(row["version"], []).append(Timing.of_row(row, row["backend"]))
    for version, timings in by_release.items():
        if {one.backend for one in several} <= {one.of for one in timings}:
            figures = comparable(timings, release=version)
            return {one.digest: figures[one.backend] for one in several}
    return {}


def decide(
    several: Sequence[Candidate], known: Evidence, devices: Sequence[int], *, may_wait: bool = True
) -> dict[int, Decision]:
    """Decide what each device of one target is given.

    Args:
        devices: those that are there first: the first ones measure.
        may_wait: whether devices may wait for what others measure.
    """
    alive = _alive(several, known)
    best = _best(alive, known)
    unknown = [one for one in alive if one.digest not in known.figures]
    told = known.told(several)
    given = Decision(Assigned.GIVEN, best.wanted, told or "no device has measured yet")
    if len(alive) == 1 or not unknown:
        return dict.fromkeys(devices, given)
    found: dict[int, Decision] = {}
    measuring = Counter(known.measuring)
    left, under_way = max(0, MEASURING - known.measurers), known.under_way
    for device in devices:
        if left:
            other = min((one for one in unknown if one is not best), key=lambda one: measuring[one.digest])
            pair = sorted((best, other), key=several.index)
            wanted = replace(pair[0].wanted, rival=pair[1].wanted)
            found[device] = Decision(Assigned.MEASURING, wanted, f"{pair[0].backend} and {pair[1].backend}")
            measuring.update(one.digest for one in pair)
            left, under_way = left - 1, under_way + 1
        elif may_wait and under_way:
            found[device] = Decision(Assigned.WAITING, best.wanted, "other devices of its target measure first")
        else:
            found[device] = given
    return found


def _alive(several: Sequence[Candidate], known: Evidence) -> Sequence[Candidate]:
    return [one for one in several if not known.is_refused(one.digest)] or several


def _best(alive: Sequence[Candidate], known: Evidence) -> Candidate:
    chosen = rule.choose([_judged(one, known.figures.get(one.digest)) for one in alive])
    return alive[chosen or 0] if known.figures else alive[0]


def _judged(one: Candidate, figure: Figure | None) -> rule.Candidate:
    return rule.Candidate(
        size=one.bytes,
        p50_ms=None if figure is None else figure.p50_ms,
        p95_ms=None if figure is None else figure.p95_ms,
        max_ms=one.max_ms,
    )

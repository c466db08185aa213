"""Drift of live inputs, outputs and confidence, by cohort: the devices' sketches of the last hours, added and compared
with the baseline in the bundle, see :mod:`kedge_protocol.drift`.

A device's counts are kept in two windows of :data:`WINDOW_SECONDS`, the one that fills and the one before it, so that
what came long ago does not hide a shift. Their size is bounded by the baseline's bins.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge.fleet.database import Database, Session
from kedge_protocol import codec, drift
from kedge_protocol.drift import Shift, Stream
from kedge_protocol.errors import ConfigError, MessageError
from kedge_protocol.messages import Telemetry

log = logging.getLogger(__name__)

WINDOW_SECONDS = 3600.0
TARGET = "target"
"""The key that divides devices by their target; every other key is a label's."""
LABELS, LABEL_VALUES, FEW = 8, 64, 4
"""The alarms in the log divide by so many labels at most, by none with more values, and by one that is another on each
device only where there are few devices."""
_MAX_COUNT = 1 << 40

_KNOWN = "SELECT since, fresh, before FROM drift_sketch WHERE device_id = ? AND model = ? AND digest = ?"
_UPSERT = """
INSERT INTO drift_sketch (device_id, model, digest, since, seen_at, fresh, before) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (device_id, model) DO UPDATE SET digest = excluded.digest, since = excluded.since,
    seen_at = excluded.seen_at, fresh = excluded.fresh, before = excluded.before
"""
_SKETCHES = """
SELECT device.name, device.target, labels, sketch.model, sketch.digest, release.version, bundle.drift, fresh, before
FROM drift_sketch AS sketch JOIN device ON device.id = device_id
JOIN bundle ON bundle.digest = sketch.digest JOIN release ON release.id = release_id
WHERE bundle.drift IS NOT NULL AND (:model IS NULL OR sketch.model = :model)
  AND (:device IS NULL OR device.name = :device) AND seen_at > :since
GROUP BY device.id, sketch.model ORDER BY sketch.model, device.name
"""

Counts = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class CohortDrift:
    """The drift of one cohort's devices that serve one bundle.

    Attributes:
        cohort: what its devices have in common: key → value.
        digest: of the bundle, which is of release ``version``.
        devices: number of devices whose sketches are added.
        streams: each stream's shift from the baseline, the largest first.
    """

    model: str
    version: str
    digest: str
    cohort: dict[str, str]
    devices: int
    streams: tuple[Shift, ...]

    @property
    def alarms(self) -> tuple[Shift, ...]:
        """The streams that have drifted, and not by chance."""
        return tuple(stream for stream in self.streams if stream.alarms)

    @property
    def name(self) -> str:
        """The cohort in words: ``site=berlin``."""
        return ", ".join(f"{key}={value}" for key, value in self.cohort.items()) or "all devices"


def note(session: Session, device: int, messages: Sequence[tuple[float, Telemetry]]) -> None:
    """Add what a device counted.

    Args:
        messages: when each came (seconds since 1970), and the message.
    """
    for at, message in messages:
        for model, told in message.models.items():
            if told.digest is not None and told.drift:
                _note(session, (device, model, told.digest), at, told.drift)


def _note(session: Session, key: tuple[int, str, str], at: float, came: Mapping[str, Sequence[int]]) -> None:
    sane = sane_counts(came)
    if not sane:
        return
    row = session.row(_KNOWN, key)
    since, fresh, before = (at, "{}", "{}") if row is None else (row["since"], row["fresh"], row["before"])
    if at - since > WINDOW_SECONDS:
        since, fresh, before = at, "{}", fresh if at - since < 2 * WINDOW_SECONDS else "{}"
    total = drift.added(json.loads(fresh), sane)
    session.run(_UPSERT, (*key, since, at, json.dumps(total, separators=(",", ":")), before))


def sane_counts(came: Mapping[str, Sequence[int]]) -> Counts:
    """Return the sketches of a message that can be; none where there are too many."""
    found = {name: list(counts) for name, counts in came.items() if _is_sane(counts)}
    return found if len(found) <= drift.MAX_STREAMS + 1 else {}  # one more tells of repeats


def _is_sane(counts: Sequence[int]) -> bool:
    return 2 <= len(counts) <= drift.MAX_BINS and all(0 <= count < _MAX_COUNT for count in counts)


def document(streams: Sequence[Stream] | None) -> str | None:
    """Return a bundle's baseline as it is stored; None without one."""
    return None if not streams else codec.encode({"streams": list(streams)}).decode()


@dataclass(frozen=True)
class _Baseline:
    streams: tuple[Stream, ...]


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of one device's samples of a model."""

    model: str
    version: str
    digest: str
    target: str
    labels: Mapping[str, str]
    streams: tuple[Stream, ...]
    counts: Counts

    def value(self, key: str) -> str:
        return self.target if key == TARGET else self.labels.get(key, "")


def cohorts(
    database: Database, *, model: str | None = None, by: Sequence[str] = (TARGET,), device: str | None = None
) -> tuple[CohortDrift, ...]:
    """Return the drift of each cohort, those with an alarm first.

    Args:
        model: of this model only.
        by: what divides the devices into cohorts: ``target``, or the name of a label. Devices without that label are
            one cohort, with an empty value. A bundle's baseline is its own: devices of different bundles are never in
            one cohort.
        device: of this device only.

    Raises:
        ConfigError: a key of ``by`` is given twice.
    """
    if len(set(by)) != len(by):
        raise ConfigError("a key is given twice", where="by", remedy="Give each label once")
    return _divided(_known(database, model, device), by)


def _known(database: Database, model: str | None = None, device: str | None = None) -> list[_Known]:
    baselines: dict[str, tuple[Stream, ...]] = {}
    found = []
    with database.read() as session:
        since = session.now() - 2 * WINDOW_SECONDS
        rows = session.rows(_SKETCHES, {"model": model, "device": device, "since": since})
    for row in rows:
        if row["digest"] not in baselines:
            baselines[row["digest"]] = read_baseline(row["drift"])
        found.append(
            _Known(
                model=row["model"],
                version=row["version"],
                digest=row["digest"],
                target=row["target"],
                labels=json.loads(row["labels"]),
                streams=baselines[row["digest"]],
                counts=drift.added(json.loads(row["fresh"]), json.loads(row["before"])),
            )
        )
    return found


def _divided(known: Sequence[_Known], by: Sequence[str]) -> tuple[CohortDrift, ...]:
    groups: dict[tuple[str, ...], list[_Known]] = {}
    for one in known:
        groups.setdefault((one.model, one.digest, *map(one.value, by)), []).append(one)
    found = []
    for (name, digest, *values), members in groups.items():
        total: Counts = {}
        for member in members:
            total = drift.added(total, member.counts)
        shifts = sorted(drift.shifts(members[0].streams, total), key=lambda one: -one.psi)
        found.append(
            CohortDrift(
                model=name,
                version=members[0].version,
                digest=digest,
                cohort=dict(zip(by, values, strict=True)),
                devices=len(members),
                streams=tuple(shifts),
            )
        )
    return tuple(sorted(found, key=lambda one: (not one.alarms, one.model, one.version, one.name)))


class Alarms:
    """Says in the log when the drift of a cohort begins and ends. A cohort is the devices of one target, or those with
    one value of a label; a label that names single devices (a serial number) makes none."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str, str]] = set()

    def look(self, database: Database) -> None:
        """Compare all cohorts with the baselines."""
        known = _known(database)
        found = {
            (one.model, one.version, one.name): one
            for key in _dividing(known)
            for one in _divided(known, (key,))
            if one.alarms and one.cohort[key]
        }
        for model, version, name in sorted(self._known - found.keys()):
            log.warning("%s:%s, %s: nothing drifts any more", model, version, name)
        for place, one in found.items():
            if place not in self._known:
                words = ", ".join(f"{shift.stream} by {shift.psi:.2f}" for shift in one.alarms)
                log.warning("%s:%s, %s (%d devices): DRIFT of %s", *place, one.devices, words)
        self._known = set(found)


def _dividing(known: Sequence[_Known]) -> list[str]:
    """Return the keys by which the alarms divide devices."""
    labelled: dict[str, list[str]] = {}
    for one in known:
        for key, value in one.labels.items():
            labelled.setdefault(key, []).append(value)
    several = [
        key
        for key, values in sorted(labelled.items())
        if len(set(values)) <= LABEL_VALUES and (len(set(values)) < len(values) or len(values) <= FEW)
    ]
    return [TARGET, *several[:LABELS]]


def read_baseline(raw: str) -> tuple[Stream, ...]:
    """Return a bundle's baseline from its :func:`document`; empty where a later Kedge wrote it."""
    try:
        return codec.decode(raw.encode(), _Baseline, where="drift baseline").streams
    except MessageError:
        return ()

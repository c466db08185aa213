"""The fleet at a glance: counts by target, health and release, and the list of devices that a person looks through.

All is counted by a few statements over columns, so that a look at thousands of devices stays cheap."""

from __future__ import annotations

import enum
from collections import Counter
from dataclasses import dataclass

from kedge.fleet import devices
from kedge.fleet.database import Row, Session
from kedge.fleet.results import DeviceRow
from kedge_protocol.messages import ModelState

HISTORY_SHOWN = 20

_DEVICES = """
SELECT device.id, name, target, labels, desired_version, coalesce(online, 0) AS online, seen_at, told_target,
       reported IS NOT NULL AS heard, failed, busy, models
FROM device LEFT JOIN device_state ON device_state.device_id = device.id
LEFT JOIN (
    SELECT device_id, count(*) AS models, max(state = :failed) AS failed,
           max(state NOT IN (:failed, :serving)) AS busy
    FROM reported_model GROUP BY device_id
) AS told ON told.device_id = device.id
WHERE NOT removed AND (:target IS NULL OR target = :target)
  AND (:text IS NULL OR instr(lower(name || ' ' || labels), lower(:text)) > 0)
  AND (:model IS NULL OR EXISTS (
      SELECT 1 FROM reported_model AS one WHERE one.device_id = device.id AND one.model = :model
        AND one.digest IS NOT NULL AND (:version IS NULL OR coalesce(one.version, '') = :version)))
ORDER BY name
"""
_RELEASES = """
SELECT model, coalesce(version, '') AS version, target, count(*) AS devices FROM reported_model
JOIN device ON device.id = device_id WHERE NOT removed AND digest IS NOT NULL
GROUP BY model, version, target ORDER BY model, version, target
"""
_HISTORY = """
SELECT rollout.id, model, version, kind, started_at, digest, previous, desired_version, superseded_by
FROM rollout_device JOIN rollout ON rollout.id = rollout_id WHERE device_id = ? ORDER BY rollout.id DESC LIMIT ?
"""


class DeviceHealth(str, enum.Enum):
    """How a device is, by its last words. The first that fits counts."""

    FAILED = "failed"  # a bundle that it shall run failed there; what it had before may serve
    UNHEARD = "unheard"  # it never reported
    OFFLINE = "offline"
    UPDATING = "updating"
    SERVING = "serving"
    IDLE = "idle"  # it is there and has no model


@dataclass(frozen=True, kw_only=True)
class TargetCount:
    """The devices of one target; ``health`` counts them by :class:`DeviceHealth`, without zeros."""

    target: str
    total: int
    online: int
    health: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ReleaseCount:
    """How many devices of a target said that they serve this version of a model; empty where they do not know it."""

    model: str
    version: str
    target: str
    devices: int


@dataclass(frozen=True, kw_only=True)
class FleetOverview:
    """The fleet in counts.

    Attributes:
        health: as of :class:`TargetCount`, over all targets.
        targets: by name.
        releases: by model, version and target.
    """

    total: int
    online: int
    health: dict[str, int]
    targets: tuple[TargetCount, ...]
    releases: tuple[ReleaseCount, ...]


@dataclass(frozen=True, kw_only=True)
class DeviceQuery:
    """Which devices to list.

    Attributes:
        text: occurs in the device's name or labels, in either case.
        model, version: which it says that it serves.
        limit, offset: so many, after so many.
    """

    target: str | None = None
    health: DeviceHealth | None = None
    model: str | None = None
    version: str | None = None
    text: str | None = None
    limit: int = 100
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class DeviceFound(DeviceRow):
    """A device in a list, with its health."""

    health: DeviceHealth


@dataclass(frozen=True, kw_only=True)
class DevicesFound:
    """The devices that a query finds: how many there are, and the part that was asked for, by name."""

    total: int
    devices: tuple[DeviceFound, ...]


@dataclass(frozen=True, kw_only=True)
class DevicePart:
    """What one rollout wanted of a device.

    Attributes:
        digest: None where the model was taken away.
        previous: what the device was to have before; None for nothing.
        superseded_by: the later rollout that wants something else; None while this one stands.
    """

    rollout: int
    model: str
    version: str
    kind: str
    started_at: float
    digest: str | None
    previous: str | None
    desired_version: int
    superseded_by: int | None


def overview(session: Session) -> FleetOverview:
    """Count the fleet."""
    rows = _rows(session, DeviceQuery())
    by_target: dict[str, list[Row]] = {}
    for row in rows:
        by_target.setdefault(row["target"], []).append(row)
    return FleetOverview(
        total=len(rows),
        online=sum(row["online"] for row in rows),
        health=_healths(rows),
        targets=tuple(
            TargetCount(
                target=target, total=len(some), online=sum(row["online"] for row in some), health=_healths(some)
            )
            for target, some in sorted(by_target.items())
        ),
        releases=tuple(ReleaseCount(**dict(row)) for row in session.rows(_RELEASES)),
    )


def find(session: Session, query: DeviceQuery) -> DevicesFound:
    """Return the devices that a query finds."""
    rows = _rows(session, query)
    if query.health is not None:
        rows = [row for row in rows if _health(row) is query.health]
    page = rows[query.offset : query.offset + query.limit]
    found = zip(devices.rows_of(session, page), page, strict=True)
    return DevicesFound(
        total=len(rows), devices=tuple(DeviceFound(**vars(device), health=_health(row)) for device, row in found)
    )


def history(session: Session, number: int) -> tuple[DevicePart, ...]:
    """Return what the latest rollouts wanted of a device, newest first."""
    rows = session.rows(_HISTORY, (number, HISTORY_SHOWN))
    return tuple(DevicePart(rollout=row["id"], **{key: row[key] for key in row.keys()[1:]}) for row in rows)


def _rows(session: Session, query: DeviceQuery) -> list[Row]:
    values = {"failed": ModelState.FAILED.value, "serving": ModelState.SERVING.value}
    asked = {"target": query.target, "text": query.text, "model": query.model, "version": query.version}
    return session.rows(_DEVICES, values | asked)


def _healths(rows: list[Row]) -> dict[str, int]:
    counts = Counter(_health(row) for row in rows)
    return {one.value: counts[one] for one in DeviceHealth if counts[one]}


def _health(row: Row) -> DeviceHealth:
    if row["failed"]:
        return DeviceHealth.FAILED
    if not row["heard"]:
        return DeviceHealth.UNHEARD
    if not row["online"]:
        return DeviceHealth.OFFLINE
    if row["busy"]:
        return DeviceHealth.UPDATING
    return DeviceHealth.SERVING if row["models"] else DeviceHealth.IDLE

"""The controller's side of the database: what it must publish and serve, and what devices said."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from kedge.fleet import tables
from kedge.fleet.database import Database, meta, note_change
from kedge.fleet.inbox import Change, Memory
from kedge.fleet.presence import Presence
from kedge_protocol import codec
from kedge_protocol.messages import MAX_VERSION_STEP, Desired, DesiredRefusal, Latency

TELEMETRY_KEPT = 60
"""Telemetry messages kept for each device."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What to publish for one device: its desired state, or nothing (``payload`` empty) to clear it.

    Attributes:
        lagging: the device is there and has not answered this version yet.
    """

    device: str
    version: int
    payload: bytes
    lagging: bool


@dataclass(frozen=True, kw_only=True)
class Roster:
    """Whom the controller serves, and with what: device → its number, blob → its bytes."""

    devices: dict[str, int]
    memories: dict[str, Memory]
    blobs: dict[str, int]


class Records:
    """Reads and writes for the controller."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def client_id(self) -> str:
        """This state folder's name at the broker: one for ever, so that a controller that comes back takes the
        connection of its former self over, and that one's will cannot come late."""
        with self._database.read() as session:
            return meta(session, "client_id")

    def roster(self) -> Roster:
        """Devices and blobs as they are now."""
        with self._database.read() as session:
            rows = list(session.scalars(select(tables.Device).where(tables.Device.removed.is_(False))))
            return Roster(
                devices={row.name: row.id for row in rows},
                memories={row.name: _memory(row.state) for row in rows},
                blobs={blob.digest: blob.size for blob in session.scalars(select(tables.Blob))},
            )

    def wishes(self) -> list[Wish]:
        """The desired state of every device that has or had one."""
        now = time.time()
        with self._database.read() as session:
            query = select(tables.Device).where(tables.Device.managed.is_(True) | tables.Device.removed.is_(True))
            return [_wish(device, now) for device in session.scalars(query)]

    def write(self, changes: Mapping[str, Change]) -> None:
        """Write what devices said, in one transaction."""
        with self._database.write() as session:
            for name, change in changes.items():
                query = select(tables.Device).where(tables.Device.name == name, tables.Device.removed.is_(False))
                device = session.scalars(query).one_or_none()
                if device is not None:
                    _write_one(session, device, change)


def _memory(state: tables.DeviceState | None) -> Memory:
    if state is None:
        return Memory()
    # An earlier controller's knowledge of who is there is worth nothing; retained states will tell.
    presence = Presence(False, state.boot_id, state.session)
    return Memory(presence, (state.reported_boot_id, state.reported_seq), state.seen_at)


def _wish(device: tables.Device, now: float) -> Wish:
    if device.removed:
        return Wish(device=device.name, version=device.desired_version, payload=b"", lagging=False)
    state = device.state
    return Wish(
        device=device.name,
        version=device.desired_version,
        payload=codec.encode(wanted_of(device, now)),
        lagging=state is not None and state.online and state.answered_version < device.desired_version,
    )


def wanted_of(device: tables.Device, now: float) -> Desired:
    """The desired state of a device as it is published."""
    return Desired(
        version=device.desired_version,
        models={row.model: row.digest for row in device.desired},
        sizes={row.digest: row.size for row in device.desired},
        sent_at=now,
    )


def _write_one(session: Session, device: tables.Device, change: Change) -> None:
    state = device.state
    if state is None:
        state = tables.DeviceState(reported=None)
        device.state = state
    memory = change.memory
    state.online, state.boot_id, state.session = (
        memory.presence.online,
        memory.presence.boot_id,
        memory.presence.session,
    )
    state.seen_at = memory.seen_at
    if change.reported is not None:
        state.reported = change.reported
        state.reported_boot_id, state.reported_seq = memory.report
        state.answered_version = change.desired_version
        if device.managed and _must_outbid(session, device, change):
            device.desired_version = max(device.desired_version, change.desired_version) + 1
            note_change(session)
    for latency in change.latencies.values():
        _note_latency(session, device, latency)
    if change.telemetry:
        session.add_all(tables.Telemetry(device_id=device.id, at=at, document=raw) for at, raw in change.telemetry)
        session.flush()
        of_device = tables.Telemetry.device_id == device.id
        newest = select(tables.Telemetry.id).where(of_device).order_by(tables.Telemetry.id.desc())
        session.execute(
            delete(tables.Telemetry).where(of_device, tables.Telemetry.id.not_in(newest.limit(TELEMETRY_KEPT)))
        )


def _must_outbid(session: Session, device: tables.Device, change: Change) -> bool:
    """Whether to speak with a number that the device heeds: it holds a higher one than ours (a database that was
    restored, a card that was cloned), or ours with other content than we wish.

    Done once after each rollout: if there is more to outbid, another controller speaks to the device too, and two that
    outbid each other would never end; :func:`kedge.fleet.progress.contradiction` names it.
    """
    ours = device.desired_version
    behind = ours < change.desired_version <= ours + MAX_VERSION_STEP
    refused = change.refused
    contradicted = refused is not None and refused.reason is DesiredRefusal.CONFLICT and refused.version == ours
    if contradicted and refused is not None:
        contradicted = refused.came == wanted_of(device, 0.0).content
    if not (behind or contradicted):
        return False
    asked = session.scalar(
        select(func.max(tables.RolloutDevice.desired_version)).where(tables.RolloutDevice.device_id == device.id)
    )
    return asked is not None and ours <= asked


def _note_latency(session: Session, device: tables.Device, latency: Latency) -> None:
    row = session.get(tables.Latency, (device.id, latency.bundle))
    known = None if row is None else (row.files, row.p50_ms, row.p95_ms, row.calls)
    if known == (latency.files, latency.p50_ms, latency.p95_ms, latency.calls):
        return  # every report repeats it
    session.merge(
        tables.Latency(
            device_id=device.id,
            bundle=latency.bundle,
            files=latency.files,
            target=device.target,
            p50_ms=latency.p50_ms,
            p95_ms=latency.p95_ms,
            calls=latency.calls,
            at=time.time(),
        )
    )

"""Devices in the database: adding, selecting, viewing, removing."""

from __future__ import annotations

import time
from collections.abc import Mapping

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from kedge.fleet import tables
from kedge.fleet.database import note_change
from kedge.fleet.results import DeviceView, Measurement, TransferView
from kedge_protocol import codec
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import Reported, Telemetry
from kedge_protocol.topics import checked_name
from kedge_targets import target as targets


def add(session: Session, name: str, target: str, labels: Mapping[str, str]) -> tables.Device:
    """See :meth:`kedge.fleet.service.FleetService.device_add`."""
    checked_name(name, "device name")
    for key, value in labels.items():
        checked_name(key, "label")
        checked_name(value, f"value of the label {key}")
    found = targets.find(target)
    device = session.scalars(select(tables.Device).where(tables.Device.name == name)).one_or_none()
    if device is not None and not device.removed:
        raise FleetError(
            f"there is a device {name!r} already (target {device.target})",
            remedy=f"Choose another name, or remove it first: kedge device remove {name}",
        )
    if device is None:
        device = tables.Device(name=name, desired_version=0)
        session.add(device)
    device.target, device.labels, device.added_at, device.removed = found.name, dict(labels), time.time(), False
    note_change(session)
    session.flush()
    return device


def find(session: Session, name: str) -> tables.Device:
    """The device of this name.

    Raises:
        FleetError: there is none; the message names those there are.
    """
    query = select(tables.Device).where(tables.Device.name == name, tables.Device.removed.is_(False))
    device = session.scalars(query).one_or_none()
    if device is None:
        there = [known.name for known in selected(session, {})]
        shown = ", ".join(there[:10]) + (", …" if len(there) > 10 else "")
        raise FleetError(f"there is no device {name!r}", remedy=f"Known are: {shown or 'none'}; see kedge device add")
    return device


def selected(session: Session, select_by: Mapping[str, str]) -> list[tables.Device]:
    """Devices that carry all these labels, by name."""
    query = select(tables.Device).where(tables.Device.removed.is_(False)).order_by(tables.Device.name)
    wanted = select_by.items()
    return [device for device in session.scalars(query) if wanted <= device.labels.items()]


def remove(session: Session, name: str) -> None:
    """Forget a device but for its name and version (see :class:`kedge.fleet.tables.Device`)."""
    device = find(session, name)
    for table in (tables.Telemetry, tables.Transfer, tables.RolloutDevice, tables.Latency):
        session.execute(delete(table).where(table.device_id == device.id))
    device.desired.clear()
    device.state = None
    device.removed, device.managed = True, False
    note_change(session)


def reported_of(device: tables.Device) -> Reported | None:
    """The device's last report."""
    if device.state is None or device.state.reported is None:
        return None
    return codec.decode(device.state.reported, Reported, where=f"report of {device.name}")


def view(device: tables.Device) -> DeviceView:
    """The device for those who ask."""
    state = device.state
    return DeviceView(
        name=device.name,
        target=device.target,
        labels=dict(device.labels),
        online=state is not None and state.online,
        seen_at=0.0 if state is None else state.seen_at,
        desired_version=device.desired_version,
        desired={row.model: row.digest for row in sorted(device.desired, key=lambda row: row.model)},
        reported=reported_of(device),
    )


def transfers(session: Session, device: tables.Device) -> tuple[TransferView, ...]:
    """What the device was sent, by blob."""
    query = (
        select(tables.Transfer, tables.Blob.size)
        .outerjoin(tables.Blob, tables.Blob.digest == tables.Transfer.digest)
        .where(tables.Transfer.device_id == device.id)
        .order_by(tables.Transfer.digest, tables.Transfer.kind)
    )
    return tuple(
        TransferView(
            digest=row.digest,
            kind=row.kind,
            size=size or 0,
            blocks_served=row.blocks_served,
            blocks_distinct=int.from_bytes(row.served, "little").bit_count(),
            finished_served_again=row.finished_served_again,
            bytes_served=row.bytes_served,
        )
        for row, size in session.execute(query)
    )


def latencies(session: Session, target: str | None) -> tuple[Measurement, ...]:
    """What devices measured, by device, then by time."""
    query = (
        select(tables.Latency, tables.Device.name).join(tables.Device).order_by(tables.Device.name, tables.Latency.at)
    )
    if target is not None:
        query = query.where(tables.Latency.target == target)
    return tuple(
        Measurement(
            device=name,
            target=row.target,
            bundle=row.bundle,
            files=row.files,
            p50_ms=row.p50_ms,
            p95_ms=row.p95_ms,
            calls=row.calls,
            at=row.at,
        )
        for row, name in session.execute(query)
    )


def telemetry(session: Session, device: tables.Device) -> tuple[Telemetry, ...]:
    """The device's telemetry that is kept, oldest first."""
    query = select(tables.Telemetry).where(tables.Telemetry.device_id == device.id).order_by(tables.Telemetry.id)
    where = f"telemetry of {device.name}"
    return tuple(codec.decode(row.document, Telemetry, where=where) for row in session.scalars(query))

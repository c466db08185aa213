"""Rollouts in the database: begin, judge, revert."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from kedge.fleet import devices, releases, tables
from kedge.fleet.database import note_change
from kedge.fleet.progress import Standing, contradiction, judge
from kedge.fleet.results import DeviceRollout, Progress, RolloutStatus
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import MAX_VERSION_STEP, Desired

ACTIVE, SUPERSEDED = "active", "superseded"
START, REVERT = "start", "revert"


@dataclass(frozen=True)
class Wanted:
    """A bundle by its manifest's digest and size (bytes)."""

    digest: str
    size: int


def start(session: Session, reference: str, select_by: Mapping[str, str]) -> tuple[tables.Rollout, dict[str, str]]:
    """See :meth:`kedge.fleet.service.FleetService.rollout_start`."""
    release = releases.find(session, reference)
    chosen = devices.selected(session, select_by)
    if not chosen:
        labels = " ".join(f"{key}={value}" for key, value in select_by.items())
        raise FleetError(
            f"no device has the labels {labels}" if labels else "there is no device",
            remedy="See kedge device list",
        )
    bundles = {bundle.target: Wanted(bundle.digest, bundle.size) for bundle in release.bundles}
    parts = {device: bundles[device.target] for device in chosen if device.target in bundles}
    skipped = {
        device.name: f"{reference} has no bundle for its target {device.target}"
        for device in chosen
        if device not in parts
    }
    if not parts:
        raise FleetError(
            f"{reference} has no bundle for any selected device",
            remedy=f"Selected are targets {', '.join(sorted({d.target for d in chosen}))}, the release has"
            f" {', '.join(sorted(bundles))}; compile it for them and publish it under another version",
        )
    rollout = tables.Rollout(model=release.name, version=release.version, kind=START, selected=dict(select_by))
    _begin(session, rollout, dict(parts))
    return rollout, skipped


def revert(session: Session, rollout_id: int | None) -> tables.Rollout:
    """See :meth:`kedge.fleet.service.FleetService.rollout_revert`."""
    old = find(session, rollout_id)
    if old.state != ACTIVE:
        raise FleetError(
            f"rollout {old.id} of {old.model} was superseded", remedy="Only a model's latest rollout can be reverted"
        )
    parts = {
        part.device: None if part.previous is None else Wanted(part.previous, part.previous_size)
        for part in old.devices
    }
    if not parts:
        raise FleetError(f"rollout {old.id} has no devices any more, there is nothing to revert")
    versions = sorted({releases.version_of(session, wanted.digest) for wanted in parts.values() if wanted})
    rollout = tables.Rollout(
        model=old.model, version=", ".join(versions) or "none", kind=REVERT, selected=old.selected, reverts=old.id
    )
    _begin(session, rollout, parts)
    return rollout


def _begin(session: Session, rollout: tables.Rollout, parts: Mapping[tables.Device, Wanted | None]) -> None:
    """Write what the devices shall run, remember what it replaces, supersede what was under way."""
    older = select(tables.Rollout).where(tables.Rollout.model == rollout.model, tables.Rollout.state == ACTIVE)
    for row in session.scalars(older):
        row.state = SUPERSEDED
    rollout.state, rollout.started_at = ACTIVE, time.time()
    for device, wanted in parts.items():
        before = next((row for row in device.desired if row.model == rollout.model), None)
        previous, size = (None, 0) if before is None else (before.digest, before.size)
        device.managed = True
        device.desired_version = next_version(device)
        if wanted is None:
            device.desired = [row for row in device.desired if row.model != rollout.model]
        elif before is None:
            device.desired.append(tables.DesiredModel(model=rollout.model, digest=wanted.digest, size=wanted.size))
        else:
            before.digest, before.size = wanted.digest, wanted.size
        rollout.devices.append(
            tables.RolloutDevice(
                device=device,
                digest=None if wanted is None else wanted.digest,
                previous=previous,
                previous_size=size,
                desired_version=device.desired_version,
                bytes_before=0 if wanted is None else _bytes_of(session, device, wanted.digest),
            )
        )
    session.add(rollout)
    note_change(session)
    session.flush()


def next_version(device: tables.Device) -> int:
    """A desired version that the device heeds: above ours and above what it answered, where that can be true."""
    answered = 0 if device.state is None else device.state.answered_version
    ours = device.desired_version
    return (max(ours, answered) if answered <= ours + MAX_VERSION_STEP else ours) + 1


def find(session: Session, rollout_id: int | None) -> tables.Rollout:
    """A rollout by number, or the latest.

    Raises:
        FleetError: there is none.
    """
    if rollout_id is None:
        latest = session.scalars(select(tables.Rollout).order_by(tables.Rollout.id.desc()).limit(1)).one_or_none()
        if latest is None:
            raise FleetError("there is no rollout", remedy="Begin one: kedge rollout start NAME:VERSION")
        return latest
    found = session.get(tables.Rollout, rollout_id)
    if found is None:
        raise FleetError(f"there is no rollout {rollout_id}")
    return found


def status(session: Session, rollout: tables.Rollout) -> RolloutStatus:
    """The rollout with the judgement on each device."""
    parts = sorted(rollout.devices, key=lambda part: part.device.name)
    judged = tuple(_judged(session, rollout, part) for part in parts)
    return RolloutStatus(
        id=rollout.id,
        model=rollout.model,
        version=rollout.version,
        kind=rollout.kind,
        state=rollout.state,
        started_at=rollout.started_at,
        selected=dict(rollout.selected),
        done=bool(judged) and all(device.progress is Progress.DONE for device in judged),
        devices=judged,
    )


def is_settled(status: RolloutStatus) -> bool:
    """Whether waiting longer can bring nothing: superseded, or every device done, failed or superseded."""
    final = (Progress.DONE, Progress.FAILED, Progress.SUPERSEDED, Progress.CONFLICT)
    return status.state == SUPERSEDED or all(device.progress in final for device in status.devices)


def _judged(session: Session, rollout: tables.Rollout, part: tables.RolloutDevice) -> DeviceRollout:
    device = part.device
    reported = devices.reported_of(device)
    standing = judge(
        model=rollout.model,
        wanted=part.digest,
        version=part.desired_version,
        reported=reported,
        online=device.state is not None and device.state.online,
    )
    wish = Desired(version=device.desired_version, models={row.model: row.digest for row in device.desired}, sizes={})
    trouble = contradiction(reported, wish.version, wish.content)
    if trouble is not None:
        standing = Standing(Progress.CONFLICT, trouble, standing.serving)
    now = next((row.digest for row in device.desired if row.model == rollout.model), None)
    pulled = 0 if part.digest is None else _bytes_of(session, device, part.digest) - part.bytes_before
    return DeviceRollout(
        device=device.name,
        target=device.target,
        progress=standing.progress if now == part.digest else Progress.SUPERSEDED,
        digest=part.digest,
        serving=standing.serving,
        previous=part.previous,
        desired_version=part.desired_version,
        detail=standing.detail,
        blocks_done=standing.blocks_done,
        blocks_total=standing.blocks_total,
        bytes_pulled=pulled,
    )


def _bytes_of(session: Session, device: tables.Device, bundle_digest: str) -> int:
    """Payload bytes that the device was ever sent of a bundle's blobs and their maps."""
    blobs = (
        select(tables.BundleBlob.digest)
        .join(tables.Bundle, tables.Bundle.id == tables.BundleBlob.bundle_id)
        .where(tables.Bundle.digest == bundle_digest)
    )
    query = select(func.coalesce(func.sum(tables.Transfer.bytes_served), 0)).where(
        tables.Transfer.device_id == device.id, tables.Transfer.digest.in_(blobs)
    )
    return int(session.scalars(query).one())

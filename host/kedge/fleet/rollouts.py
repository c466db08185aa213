"""Starts and reverts rollouts in the database; :mod:`kedge.fleet.rollout_status` reports their status.

A rollout owns its devices until a newer rollout of the same model takes some of them over: those parts are superseded,
the others are not. All is written by few statements, whatever the number of devices, so that the write lock is short.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge.fleet import devices, releases
from kedge.fleet.database import Row, Session, note_change
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import MAX_VERSION_STEP

ACTIVE, SUPERSEDED = "active", "superseded"
START, REVERT = "start", "revert"

_PART = """
INSERT INTO rollout_device
(rollout_id, device_id, digest, previous, previous_size, desired_version, bytes_before)
VALUES (:rollout, :device, :digest, :previous, :previous_size, :version, :bytes_before)
"""
_DESIRED = """
INSERT INTO desired_model (device_id, model, digest, size) VALUES (:device, :model, :digest, :size)
ON CONFLICT (device_id, model) DO UPDATE SET digest = excluded.digest, size = excluded.size
"""
_SUPERSEDE_PARTS = """
UPDATE rollout_device SET superseded_by = :rollout
WHERE superseded_by IS NULL AND rollout_id <> :rollout
  AND rollout_id IN (SELECT id FROM rollout WHERE model = :model)
  AND device_id IN (SELECT device_id FROM rollout_device WHERE rollout_id = :rollout)
"""
_SUPERSEDE_ROLLOUTS = """
UPDATE rollout SET state = 'superseded'
WHERE model = :model AND state = 'active' AND id <> :rollout AND NOT EXISTS (
    SELECT 1 FROM rollout_device WHERE rollout_id = rollout.id AND superseded_by IS NULL
)
"""
_BYTES = """
SELECT device_id, needed.bundle, sum(bytes_served) AS bytes FROM transfer
JOIN (
    SELECT DISTINCT bundle.digest AS bundle, bundle_blob.digest AS blob
    FROM bundle JOIN bundle_blob ON bundle_id = bundle.id WHERE bundle.digest IN {}
) AS needed ON needed.blob = transfer.digest
GROUP BY device_id, needed.bundle
"""


@dataclass(frozen=True)
class Wanted:
    """A bundle by its manifest's digest and size (bytes)."""

    digest: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned rollout: its row's values and the wanted bundle of each device, by number; None removes the model."""

    model: str
    version: str
    kind: str
    selected: str
    parts: Mapping[int, Wanted | None]
    reverts: int | None = None


def start(session: Session, reference: str, select_by: Mapping[str, str]) -> tuple[int, dict[str, str]]:
    """See :meth:`kedge.fleet.service.FleetService.rollout_start`; the rollout's number, and who is left out why."""
    release = releases.find(session, reference)
    chosen = devices.select_devices(session, select_by)
    if not chosen:
        labels = " ".join(f"{key}={value}" for key, value in select_by.items())
        raise FleetError(
            f"no device has the labels {labels}" if labels else "there is no device",
            remedy="See kedge device list",
        )
    rows = session.rows("SELECT target, digest, size FROM bundle WHERE release_id = ?", (release["id"],))
    bundles = {row["target"]: Wanted(row["digest"], row["size"]) for row in rows}
    parts = {row["id"]: bundles[row["target"]] for row in chosen if row["target"] in bundles}
    skipped = {
        row["name"]: f"{reference} has no bundle for its target {row['target']}"
        for row in chosen
        if row["target"] not in bundles
    }
    if not parts:
        raise FleetError(
            f"{reference} has no bundle for any selected device",
            remedy=f"Selected are targets {', '.join(sorted({row['target'] for row in chosen}))}, the release has"
            f" {', '.join(sorted(bundles))}; compile it for them and publish it under another version",
        )
    plan = Plan(
        model=release["name"],
        version=release["version"],
        kind=START,
        selected=json.dumps(dict(select_by)),
        parts=parts,
    )
    return _begin(session, plan), skipped


def revert(session: Session, rollout_id: int | None) -> int:
    """See :meth:`kedge.fleet.service.FleetService.rollout_revert`; the new rollout's number."""
    old = find(session, rollout_id)
    rows = session.rows("SELECT * FROM rollout_device WHERE rollout_id = ?", (old["id"],))
    if not rows:
        raise FleetError(f"rollout {old['id']} has no devices any more, there is nothing to revert")
    own = [row for row in rows if row["superseded_by"] is None]
    if not own:
        newer = sorted({row["superseded_by"] for row in rows})
        raise FleetError(
            f"rollout {old['id']} of {old['model']} was superseded on all its devices",
            remedy=f"Revert what took them over: rollout {', '.join(map(str, newer))}",
        )
    parts = {
        row["device_id"]: None if row["previous"] is None else Wanted(row["previous"], row["previous_size"])
        for row in own
    }
    digests = sorted({wanted.digest for wanted in parts.values() if wanted})
    _check_published(session, digests)
    plan = Plan(
        model=old["model"],
        version=", ".join(releases.versions(session, digests)) or "none",
        kind=REVERT,
        selected=old["selected"],
        parts=parts,
        reverts=old["id"],
    )
    return _begin(session, plan)


def _check_published(session: Session, digests: Sequence[str]) -> None:
    there = {row["digest"] for row in session.where_in("SELECT digest FROM bundle WHERE digest IN {}", digests)}
    if missing := [digest for digest in digests if digest not in there]:
        raise FleetError(
            f"the release with the bundle {missing[0]} was removed, it cannot be brought back",
            remedy="Publish it again, or roll out another release",
        )


def _begin(session: Session, plan: Plan) -> int:
    """Write the desired bundles, remember those they replace, and supersede other rollouts on these devices."""
    number = session.insert(
        "INSERT INTO rollout (model, version, kind, state, started_at, selected, reverts) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (plan.model, plan.version, plan.kind, ACTIVE, session.now(), plan.selected, plan.reverts),
    )
    rows = _rows(session, number, plan)
    session.run_many("UPDATE device SET managed = 1, desired_version = :version WHERE id = :device", rows)
    session.run_many(_DESIRED, [row for row in rows if row["digest"] is not None])
    taken = [row for row in rows if row["digest"] is None]
    session.run_many("DELETE FROM desired_model WHERE device_id = :device AND model = :model", taken)
    session.run_many(_PART, rows)
    session.run(_SUPERSEDE_PARTS, {"rollout": number, "model": plan.model})
    session.run(_SUPERSEDE_ROLLOUTS, {"rollout": number, "model": plan.model})
    note_change(session)
    return number


def _rows(session: Session, rollout: int, plan: Plan) -> list[dict[str, object]]:
    query = "SELECT device_id, digest, size FROM desired_model WHERE model = ?"
    before = {row["device_id"]: row for row in session.rows(query, (plan.model,))}
    query = """
        SELECT device.id, desired_version, coalesce(answered_version, 0) AS answered
        FROM device LEFT JOIN device_state ON device_state.device_id = device.id
    """
    versions = {row["id"]: next_version(row["desired_version"], row["answered"]) for row in session.rows(query)}
    sent = bytes_sent(session, sorted({wanted.digest for wanted in plan.parts.values() if wanted}))
    rows = []
    for device, wanted in plan.parts.items():
        previous = before.get(device)
        rows.append(
            {
                "rollout": rollout,
                "device": device,
                "model": plan.model,
                "digest": None if wanted is None else wanted.digest,
                "size": 0 if wanted is None else wanted.size,
                "previous": None if previous is None else previous["digest"],
                "previous_size": 0 if previous is None else previous["size"],
                "version": versions[device],
                "bytes_before": 0 if wanted is None else sent.get((device, wanted.digest), 0),
            }
        )
    return rows


def next_version(ours: int, answered: int) -> int:
    """Return a desired version that the device accepts: above ours and above the one it answered, if that is
    plausible."""
    return (max(ours, answered) if answered <= ours + MAX_VERSION_STEP else ours) + 1


def bytes_sent(session: Session, bundles: Sequence[str]) -> dict[tuple[int, str], int]:
    """Return the payload bytes ever sent of these bundles' blobs and maps, by device number and bundle."""
    return {(row["device_id"], row["bundle"]): row["bytes"] for row in session.where_in(_BYTES, bundles)}


def blobs(session: Session, rollout: int) -> dict[str, int]:
    """Return all blobs of a rollout's bundles, with their bytes."""
    query = """
        SELECT DISTINCT blob.digest, blob.size FROM bundle
        JOIN bundle_blob ON bundle_id = bundle.id JOIN blob ON blob.digest = bundle_blob.digest
        WHERE bundle.digest IN (SELECT DISTINCT digest FROM rollout_device WHERE rollout_id = ?)
    """
    return {row["digest"]: row["size"] for row in session.rows(query, (rollout,))}


def find(session: Session, rollout_id: int | None) -> Row:
    """Return a rollout by number, or the latest.

    Raises:
        FleetError: there is none.
    """
    if rollout_id is None:
        latest = session.row("SELECT * FROM rollout ORDER BY id DESC LIMIT 1")
        if latest is None:
            raise FleetError("there is no rollout", remedy="Begin one: kedge rollout start NAME:VERSION")
        return latest
    # SQLite cannot be asked for a number of more than 63 bits.
    found = None
    if 0 < rollout_id < 1 << 63:
        found = session.row("SELECT * FROM rollout WHERE id = ?", (rollout_id,))
    if found is None:
        raise FleetError(f"there is no rollout {rollout_id}", remedy="See kedge rollout list")
    return found

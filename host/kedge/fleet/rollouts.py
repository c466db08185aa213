"""Starts and reverts rollouts in the database; :mod:`kedge.fleet.rollout_status` reports their status.

A rollout owns its devices until a newer rollout of the same model takes some of them over: those parts are superseded,
the others are not. All is written by few statements, whatever the number of devices, so that the write lock is short.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge.fleet import releases
from kedge.fleet.database import Row, Session, note_change
from kedge_protocol.errors import FleetError
from kedge_protocol.messages import MAX_VERSION_STEP

ACTIVE, SUPERSEDED, ABORTED = "active", "superseded", "aborted"
START, REVERT = "start", "revert"

_PART = """
INSERT INTO rollout_device
(rollout_id, device_id, digest, previous, previous_size, desired_version, bytes_before)
VALUES (:rollout, :device, :digest, :previous, :previous_size, :version, :bytes_before)
ON CONFLICT (rollout_id, device_id) DO UPDATE SET digest = excluded.digest,
    desired_version = excluded.desired_version, bytes_before = excluded.bytes_before
"""
_DESIRED = """
INSERT OR REPLACE INTO desired_model (device_id, model, digest, size, soak, rival, rival_size, ordered)
VALUES (:device, :model, :digest, :size, :soak, :rival, :rival_size, :version)
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
) AND id NOT IN (SELECT rollout_id FROM rollout_stage WHERE phase NOT IN ('done', 'incomplete'))
"""
_TAKE_MEMBERS = """
UPDATE rollout_member SET step = 'gone'
WHERE step <> 'gone' AND device_id IN (SELECT device_id FROM {table} WHERE rollout_id = :rollout)
  AND rollout_id IN (
    SELECT id FROM rollout JOIN rollout_stage ON rollout_id = id
    WHERE model = :model AND id <> :rollout AND coalesce(revert_id, 0) <> :rollout AND id <> :reverts
      AND (phase <> 'aborted' OR step = 'reverting')
  )
"""
_NEW_EDITION = """
UPDATE rollout_stage SET edition = edition + 1 WHERE rollout_id IN (SELECT id FROM rollout WHERE model = ?)
"""
_END_STAGES = """
UPDATE rollout_stage SET phase = 'superseded', live = 0, since = :now, reason = 'newer rollouts have all of its devices'
WHERE phase NOT IN ('reverting', 'aborted', 'superseded')
  AND rollout_id IN (SELECT id FROM rollout WHERE model = :model) AND NOT EXISTS (
    SELECT 1 FROM rollout_member AS one WHERE one.rollout_id = rollout_stage.rollout_id AND one.step <> 'gone'
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
    """A bundle by its manifest's digest and size (bytes), and another one that is to be measured beside it."""

    digest: str
    size: int
    rival: Wanted | None = None

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of both."""
        return (self.digest,) if self.rival is None else (self.digest, self.rival.digest)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned rollout: its row's values and the wanted bundle of each device, by number; None removes the model."""

    model: str
    version: str
    kind: str
    selected: str
    parts: Mapping[int, Wanted | None]
    reverts: int | None = None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The devices that a rollout of a release reaches.

    Attributes:
        release: its row.
        bundles: target → the bundle for it.
        targets: device's number → its target, of those that it reaches.
        skipped: device's name → why it cannot be reached.
    """

    release: Row
    bundles: Mapping[str, Wanted]
    targets: Mapping[int, str]
    skipped: Mapping[str, str]


def select(session: Session, release: Row, chosen: Sequence[Row]) -> Selection:
    """Find the bundle of each chosen device.

    Raises:
        FleetError: the release has none for any of them.
    """
    reference = f"{release['name']}:{release['version']}"
    bundles = bundles_of(session, release["id"])
    skipped = {
        row["name"]: f"{reference} has no bundle for its target {row['target']}"
        for row in chosen
        if row["target"] not in bundles
    }
    if len(skipped) == len(chosen):
        raise FleetError(
            f"{reference} has no bundle for any selected device",
            remedy=f"Selected are targets {', '.join(sorted({row['target'] for row in chosen}))}, the release has"
            f" {', '.join(sorted(bundles))}; compile it for them and publish it under another version",
        )
    targets = {row["id"]: row["target"] for row in chosen if row["target"] in bundles}
    return Selection(release=release, bundles=bundles, targets=targets, skipped=skipped)


def bundles_of(session: Session, release: int) -> dict[str, Wanted]:
    """Return target → bundle of a release; of several the compiler's choice."""
    rows = session.rows("SELECT target, digest, size FROM bundle WHERE release_id = ? AND preference = 0", (release,))
    return {row["target"]: Wanted(row["digest"], row["size"]) for row in rows}


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
    return take_back(session, old, own)


def take_back(session: Session, old: Row, own: Sequence[Row]) -> int:
    """Begin a rollout that gives these parts of another one what they had before; its number.

    Raises:
        FleetError: what they had was removed.
    """
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


def own_parts(session: Session, rollout: int, numbers: Sequence[int]) -> list[Row]:
    """Return the parts of these devices that no newer rollout has taken over."""
    query = (
        f"SELECT * FROM rollout_device WHERE rollout_id = {rollout:d} AND superseded_by IS NULL AND device_id IN {{}}"
    )
    return session.where_in(query, numbers)


def check_previous(session: Session, rollout: Row, numbers: Sequence[int]) -> None:
    """Refuse to take these devices back to what was removed.

    Raises:
        FleetError: a release that they had before is not there any more.
    """
    parts = own_parts(session, rollout["id"], numbers)
    _check_published(session, sorted({part["previous"] for part in parts if part["previous"] is not None}))


def _check_published(session: Session, digests: Sequence[str]) -> None:
    there = {row["digest"] for row in session.where_in("SELECT digest FROM bundle WHERE digest IN {}", digests)}
    if missing := [digest for digest in digests if digest not in there]:
        raise FleetError(
            f"the release with the bundle {missing[0]} was removed, it cannot be brought back",
            remedy="Publish it again, or roll out another release",
        )


def _begin(session: Session, plan: Plan) -> int:
    """Write the desired bundles, remember those they replace, and supersede other rollouts on these devices."""
    number = create(session, plan)
    give(session, number, plan.model, plan.parts)
    claim(session, number, plan.model, table="rollout_device", reverts=plan.reverts)
    return number


def create(session: Session, plan: Plan) -> int:
    """Write a rollout that wants nothing of any device yet; its number."""
    return session.insert(
        "INSERT INTO rollout (model, version, kind, state, started_at, selected, reverts) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (plan.model, plan.version, plan.kind, ACTIVE, session.now(), plan.selected, plan.reverts),
    )


def give(session: Session, rollout: int, model: str, parts: Mapping[int, Wanted | None], *, soak: float = 0.0) -> None:
    """Write what a rollout wants of devices, and what they were to have before.

    Args:
        soak: seconds that a device waits for calls of users before it sends golden samples to itself.
    """
    rows = [row | {"soak": soak} for row in _rows(session, rollout, model, parts)]
    session.run_many("UPDATE device SET managed = 1, desired_version = :version WHERE id = :device", rows)
    session.run_many(_DESIRED, [row for row in rows if row["digest"] is not None])
    taken = [row for row in rows if row["digest"] is None]
    session.run_many("DELETE FROM desired_model WHERE device_id = :device AND model = :model", taken)
    session.run_many(_PART, rows)
    session.run(_SUPERSEDE_PARTS, {"rollout": rollout, "model": model})
    session.run(_SUPERSEDE_ROLLOUTS, {"rollout": rollout, "model": model})
    note_change(session)


def hold(session: Session, rollout: int, model: str, parts: Mapping[int, Wanted]) -> None:
    """Write devices of a rollout that are told later: what they were to have before is what they are still to have."""
    rows = _rows(session, rollout, model, parts)
    session.run_many(_PART, rows)
    session.run(_SUPERSEDE_PARTS, {"rollout": rollout, "model": model})
    session.run(_SUPERSEDE_ROLLOUTS, {"rollout": rollout, "model": model})
    note_change(session)


def shadow(session: Session, model: str, bundles: Mapping[int, Wanted], *, share: float, memory_bytes: int) -> None:
    """Let devices run bundles beside those that they are to have, within a budget.

    Args:
        bundles: device's number → the bundle.
        share: of a processor core.
    """
    rows = [(device, model, one.digest, one.size, share, memory_bytes) for device, one in bundles.items()]
    session.run_many("INSERT OR REPLACE INTO desired_shadow VALUES (?, ?, ?, ?, ?, ?)", rows)
    publish(session, list(bundles))


def unshadow(session: Session, model: str, numbers: Sequence[int]) -> None:
    """End the shadows of a model on devices."""
    session.run_many(
        "DELETE FROM desired_shadow WHERE device_id = ? AND model = ?", [(number, model) for number in numbers]
    )
    publish(session, numbers)


def publish(session: Session, numbers: Sequence[int]) -> None:
    """Give devices their desired state under a new version."""
    versions = next_versions(session, numbers)
    session.run_many("UPDATE device SET desired_version = ? WHERE id = ?", [(versions[one], one) for one in numbers])
    note_change(session)


def give_again(session: Session, rollout: int, parts: Sequence[int]) -> None:
    """Ask the same of devices once more, under a new version, so that a device that refused it tries again."""
    versions = next_versions(session, parts)
    rows = [{"rollout": rollout, "device": device, "version": versions[device]} for device in parts]
    session.run_many("UPDATE device SET desired_version = :version WHERE id = :device", rows)
    session.run_many(
        "UPDATE rollout_device SET desired_version = :version WHERE rollout_id = :rollout AND device_id = :device", rows
    )
    session.run_many(
        "UPDATE desired_model SET ordered = :version WHERE device_id = :device"
        " AND model = (SELECT model FROM rollout WHERE id = :rollout)",
        rows,
    )
    note_change(session)


def claim(session: Session, rollout: int, model: str, *, table: str, reverts: int | None = None) -> None:
    """Take devices out of other staged rollouts of a model, told or not.

    Args:
        table: ``rollout_device`` or ``rollout_member``: which of the rollout's devices.
        reverts: the rollout that it takes back, which watches its devices go.
    """
    values = {"rollout": rollout, "model": model, "reverts": reverts or 0}
    session.run(_TAKE_MEMBERS.format(table=table), values)
    session.run(_NEW_EDITION, (model,))
    session.run(_END_STAGES, {"model": model, "now": session.now()})
    session.run(
        "UPDATE rollout SET state = 'superseded' WHERE model = ? AND state = 'active' AND id IN"
        " (SELECT rollout_id FROM rollout_stage WHERE phase = 'superseded')",
        (model,),
    )


def next_versions(session: Session, numbers: Sequence[int]) -> dict[int, int]:
    """Return device's number → the desired version that it is given next."""
    query = """
        SELECT device.id, desired_version, coalesce(answered_version, 0) AS answered
        FROM device LEFT JOIN device_state ON device_state.device_id = device.id WHERE device.id IN {}
    """
    return {
        row["id"]: next_version(row["desired_version"], row["answered"]) for row in session.where_in(query, numbers)
    }


def _rows(session: Session, rollout: int, model: str, parts: Mapping[int, Wanted | None]) -> list[dict[str, object]]:
    numbers = list(parts)
    query = "SELECT device_id, model, digest, size FROM desired_model WHERE device_id IN {}"
    before = {row["device_id"]: row for row in session.where_in(query, numbers) if row["model"] == model}
    versions = next_versions(session, numbers)
    sent = bytes_sent(session, sorted({digest for wanted in parts.values() if wanted for digest in wanted.digests}))
    rows = []
    for device, wanted in parts.items():
        previous = before.get(device)
        rows.append(
            {
                "rollout": rollout,
                "device": device,
                "model": model,
                "digest": None if wanted is None else wanted.digest,
                "size": 0 if wanted is None else wanted.size,
                "rival": None if wanted is None or wanted.rival is None else wanted.rival.digest,
                "rival_size": 0 if wanted is None or wanted.rival is None else wanted.rival.size,
                "previous": None if previous is None else previous["digest"],
                "previous_size": 0 if previous is None else previous["size"],
                "version": versions[device],
                "bytes_before": 0 if wanted is None else sum(sent.get((device, one), 0) for one in wanted.digests),
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
    """Return all blobs of a rollout's bundles and of those that its devices choose among, with their bytes."""
    query = """
        SELECT DISTINCT blob.digest, blob.size FROM bundle
        JOIN bundle_blob ON bundle_id = bundle.id JOIN blob ON blob.digest = bundle_blob.digest
        WHERE (bundle.release_id, bundle.target) IN (
            SELECT release_id, target FROM bundle AS own
            WHERE own.digest IN (SELECT DISTINCT digest FROM rollout_device WHERE rollout_id = ?)
        )
    """
    return {row["digest"]: row["size"] for row in session.rows(query, (rollout,))}


def blobs_of_release(session: Session, release: int) -> dict[str, int]:
    """Return all blobs of a release's bundles, with their bytes."""
    query = """
        SELECT DISTINCT blob.digest, blob.size FROM bundle
        JOIN bundle_blob ON bundle_id = bundle.id JOIN blob ON blob.digest = bundle_blob.digest WHERE release_id = ?
    """
    return {row["digest"]: row["size"] for row in session.rows(query, (release,))}


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

"""The controller's view of the database: what it must publish and serve, and the devices' messages, in batches."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from kedge.fleet import assigning, call_figures, device_reports, devices, drift, sample_parts
from kedge.fleet.database import Database, Session, meta, note_change
from kedge.fleet.inbox import Change, DeviceState
from kedge.fleet.keys import Keys
from kedge.fleet.presence import Presence
from kedge_protocol import codec
from kedge_protocol.messages import MAX_VERSION_STEP, Desired, DesiredRefusal, Reported
from kedge_protocol.signatures import Envelope, parse_envelope, sign
from kedge_protocol.trust import DESIRED_TYPE, Role

TELEMETRY_KEPT = 60
"""Telemetry messages kept for each device."""
TELEMETRY_SLACK = 20
"""Number of additional messages before the oldest are deleted in one go."""
COMMAND_SECONDS = 60.0
"""Age, in seconds, after which an unsent command is not sent any more."""

_STATE = """
INSERT INTO device_state
(device_id, online, boot_id, session, seen_at, reported, reported_boot_id, reported_seq, answered_version)
VALUES (:id, :online, :boot_id, :session, :seen_at, NULL, '', 0, 0)
ON CONFLICT (device_id) DO UPDATE SET
    online = excluded.online, boot_id = excluded.boot_id, session = excluded.session, seen_at = excluded.seen_at
"""
_REPORTED = """
UPDATE device_state SET reported = ?, reported_boot_id = ?, reported_seq = ?, answered_version = ? WHERE device_id = ?
"""
_PRUNE = """
DELETE FROM telemetry WHERE device_id = :id AND id <= (
    SELECT id FROM telemetry WHERE device_id = :id ORDER BY id DESC LIMIT 1 OFFSET :kept
)
"""


@dataclass(frozen=True, kw_only=True)
class DesiredPublication:
    """What to publish for one device: its desired state, or nothing (``payload`` empty) to clear it."""

    device: str
    version: int
    payload: bytes


@dataclass(frozen=True, kw_only=True)
class FleetSnapshot:
    """The devices that the controller serves, and what they may get.

    Attributes:
        changes: the number of changes that it is of.
        memories: what is known of each device, by name.
        versions: what must be published, by name, removed devices included: the desired version, or None for nothing.
        desired: bundles that a device shall run.
        blobs: blob → its bytes.
        bundles: bundle → its blobs.
    """

    changes: int
    memories: dict[str, DeviceState]
    versions: dict[str, int | None]
    desired: dict[str, frozenset[str]]
    blobs: dict[str, int]
    bundles: dict[str, frozenset[str]]

    @property
    def devices(self) -> dict[str, int]:
        """Return device → number."""
        return {name: memory.number for name, memory in self.memories.items()}


@dataclass(frozen=True, kw_only=True)
class PendingCommand:
    """A command to send to a device."""

    cid: str
    device: str
    verb: str


class ControllerStore:
    """Reads and writes for the controller."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._keys = Keys(database.path.parent)
        self._changes = -1
        self._telemetry: dict[int, int] = {}

    def client_id(self) -> str:
        """Return this state folder's MQTT client id. It never changes, so that a restarted controller takes over its
        previous connection, whose will then cannot arrive late."""
        with self._database.read() as session:
            return meta(session, "client_id")

    def nobody_is_there(self) -> None:
        """Mark all devices as offline: a killed controller's data does not show who is online, and retained states will
        follow."""
        with self._database.write() as session:
            session.run("UPDATE device_state SET online = 0 WHERE online")

    def snapshot(self, *, known: Collection[str] = ()) -> FleetSnapshot:
        """Return the current devices and blobs.

        Args:
            known: devices whose memory the caller has already: theirs is answered without what they said.
        """
        with self._database.read() as session:
            self._changes = int(meta(session, "changes"))
            rows = session.rows("SELECT id, name, added_at, desired_version, managed, removed FROM device")
            there = {row["id"]: row["name"] for row in rows if not row["removed"]}
            memories = {
                row["name"]: DeviceState(number=row["id"], added_at=row["added_at"])
                for row in rows
                if not row["removed"]
            }
            if not memories.keys() <= set(known):
                _remember(session, {memory.number: memory for memory in memories.values()})
            return FleetSnapshot(
                changes=self._changes,
                memories=memories,
                versions={row["name"]: row["desired_version"] if row["managed"] else None for row in rows},
                desired=_grouped(
                    (there.get(row["device_id"], ""), row["digest"])
                    for row in session.rows(
                        "SELECT device_id, digest FROM desired_model"
                        " UNION ALL SELECT device_id, rival FROM desired_model WHERE rival IS NOT NULL"
                        " UNION ALL SELECT device_id, digest FROM desired_shadow"
                    )
                ),
                blobs={row["digest"]: row["size"] for row in session.rows("SELECT digest, size FROM blob")},
                bundles=_grouped(
                    (row["bundle"], row["digest"])
                    for row in session.rows(
                        "SELECT bundle.digest AS bundle, bundle_blob.digest FROM bundle_blob"
                        " JOIN bundle ON bundle.id = bundle_id"
                    )
                ),
            )

    def publications(self, names: Sequence[str]) -> list[DesiredPublication]:
        """Return the desired states of these devices, in this order."""
        with self._database.read() as session:
            query = "SELECT id, name, desired_version, managed FROM device WHERE name IN {}"
            known = {row["name"]: row for row in session.where_in(query, names)}
            numbers = [row["id"] for row in known.values() if row["managed"]]
            states = devices.desired_states(
                session, {row["id"]: row["desired_version"] for row in known.values()}, numbers
            )
            statements = _statements(session, {digest for state in states.values() for digest in state.sizes})
        signer, rotations = self._keys.private(Role.CONTROLLER), self._keys.rotations()
        now = self._database.clock()
        wanted = [
            (name, _signed_for(name, states.get(known[name]["id"]), statements, rotations, now))
            for name in names
            if name in known
        ]
        return [
            DesiredPublication(
                device=name,
                version=known[name]["desired_version"],
                payload=b"" if desired is None else codec.encode(sign(DESIRED_TYPE, codec.encode(desired), signer)),
            )
            for name, desired in wanted
        ]

    def lagging(self) -> set[str]:
        """Return online devices that have not answered their desired state."""
        with self._database.read() as session:
            rows = session.rows(
                "SELECT name FROM device JOIN device_state ON device_id = device.id"
                " WHERE managed AND online AND answered_version < desired_version"
            )
        return {row["name"] for row in rows}

    def pending_commands(self) -> list[PendingCommand]:
        """Return unsent commands that are not too old."""
        with self._database.read() as session:
            rows = session.rows(
                "SELECT cid, name, verb FROM command JOIN device ON device.id = device_id"
                " WHERE sent_at IS NULL AND asked_at > ? ORDER BY asked_at",
                (session.now() - COMMAND_SECONDS,),
            )
        return [PendingCommand(cid=row["cid"], device=row["name"], verb=row["verb"]) for row in rows]

    def sent(self, cids: Collection[str]) -> None:
        """Mark these commands as sent."""
        with self._database.write() as session:
            now = session.now()
            session.run_many("UPDATE command SET sent_at = ? WHERE cid = ?", [(now, cid) for cid in cids])

    def write(self, changes: Mapping[str, Change]) -> None:
        """Write the devices' messages in one transaction."""
        with self._database.write() as session:
            if int(meta(session, "changes")) != self._changes:
                # One may have been removed since the roster was read.
                there = {row["id"] for row in session.rows("SELECT id FROM device WHERE NOT removed")}
                changes = {name: change for name, change in changes.items() if change.memory.number in there}
            states = [_state(change.memory) for change in changes.values() if change.touched]
            session.run_many(_STATE, states)
            for change in changes.values():
                _write_one(session, change)
            self._write_telemetry(session, changes.values())
            call_figures.note(
                session, {change.memory.number: change.measured for change in changes.values() if change.measured}
            )
            for change in changes.values():
                drift.note(session, change.memory.number, change.measured)
        for change in changes.values():
            if change.touched:
                change.memory.noted_at = change.memory.seen_at

    def _write_telemetry(self, session: Session, changes: Iterable[Change]) -> None:
        rows, full = [], []
        for change in changes:
            number, messages = change.memory.number, change.telemetry
            if not messages:
                continue
            rows += [(number, at, raw) for at, raw in messages]
            # What an earlier controller left is not known: the first look comes early.
            count = self._telemetry.get(number, TELEMETRY_KEPT) + len(messages)
            if count >= TELEMETRY_KEPT + TELEMETRY_SLACK:
                full.append({"id": number, "kept": TELEMETRY_KEPT})
                count = TELEMETRY_KEPT
            self._telemetry[number] = count
        session.run_many("INSERT INTO telemetry (device_id, at, document) VALUES (?, ?, ?)", rows)
        session.run_many(_PRUNE, full)


def _grouped(pairs: Iterable[tuple[str, str]]) -> dict[str, frozenset[str]]:
    found: dict[str, set[str]] = {}
    for key, value in pairs:
        found.setdefault(key, set()).add(value)
    return {key: frozenset(values) for key, values in found.items()}


def _remember(session: Session, memories: Mapping[int, DeviceState]) -> None:
    """Restore what devices reported to an earlier controller."""
    query = "SELECT device_id, boot_id, session, seen_at, reported_boot_id, reported_seq FROM device_state"
    for row in session.rows(query):
        if memory := memories.get(row["device_id"]):
            # Its knowledge of who is there is worth nothing; retained states will tell.
            memory.presence = Presence(False, row["boot_id"], row["session"])
            memory.report = (row["reported_boot_id"], row["reported_seq"])
            memory.seen_at = memory.noted_at = row["seen_at"]
    for row in session.rows("SELECT device_id, desired, digest, previous FROM reported_model"):
        if memory := memories.get(row["device_id"]):
            memory.bundles |= {row[name] for name in ("desired", "digest", "previous") if row[name]}


def _statements(session: Session, digests: Collection[str]) -> dict[tuple[str, str], Envelope]:
    """Return (model, bundle) → the signed statement of the newest release that holds it."""
    query = """
        SELECT bundle.digest, name, statement FROM bundle JOIN release ON release.id = release_id
        WHERE statement IS NOT NULL AND bundle.digest IN {} ORDER BY release.id
    """
    rows = session.where_in(query, sorted(digests))
    return {(row["name"], row["digest"]): parse_envelope(row["statement"], where=row["name"]) for row in rows}


def _signed_for(
    name: str,
    desired: Desired | None,
    statements: Mapping[tuple[str, str], Envelope],
    rotations: tuple[Envelope, ...],
    now: float,
) -> Desired | None:
    """Return a desired state with all that its signature needs; None where nothing is wanted of the device."""
    if desired is None:
        return None
    shadows = ((model, shadow.digest) for model, shadow in desired.shadows.items())
    bundles = [*desired.models.items(), *desired.rivals.items(), *shadows]
    return replace(
        desired,
        sent_at=now,
        device=name,
        # Candidates are of one release, which is said once.
        releases=tuple(dict.fromkeys(statements[bundle] for bundle in bundles if bundle in statements)),
        rotations=rotations,
    )


def _state(memory: DeviceState) -> dict[str, object]:
    known = memory.presence
    return {
        "id": memory.number,
        "online": known.online,
        "boot_id": known.boot_id,
        "session": known.session,
        "seen_at": memory.seen_at,
    }


def _write_one(session: Session, change: Change) -> None:
    number = change.memory.number
    if change.reported is not None and change.view is not None:
        values = (change.reported, *change.memory.report, change.view.desired_version, number)
        session.run(_REPORTED, values)
        device_reports.note(session, number, change.view)
        sample_parts.note(session, number, change.view)
        if _must_outbid(session, number, change.view):
            session.run(
                "UPDATE device SET desired_version = max(desired_version, ?) + 1 WHERE id = ?",
                (change.view.desired_version, number),
            )
            note_change(session)
    for latency in change.latencies.values():
        device_reports.note_latency(session, number, latency)
    if change.view is not None:
        assigning.settle(session, number, change.view)
    for ack in change.acks:
        session.run(
            "UPDATE command SET answered_at = ?, ok = ?, detail = ? WHERE cid = ? AND device_id = ?",
            (session.now(), ack.ok, ack.detail, ack.cid, number),
        )


def _must_outbid(session: Session, number: int, view: Reported) -> bool:
    """Return whether the device needs a higher desired version than ours: it holds a higher one (a restored database, a
    cloned card), or the same one with other content.

    Done once after each rollout: if there is more to outbid, another controller speaks to the device too, and two that
    outbid each other would never end; :func:`kedge.fleet.device_progress.contradiction` names it.
    """
    ours = session.value("SELECT desired_version FROM device WHERE id = ? AND managed", (number,))
    if ours is None:
        return False
    refused = view.refused
    contradicted = refused is not None and refused.reason is DesiredRefusal.CONFLICT and refused.version == ours
    if contradicted and refused is not None:
        contradicted = refused.came == devices.desired_state(session, number, ours).content
    if not (ours < view.desired_version <= ours + MAX_VERSION_STEP or contradicted):
        return False
    asked = session.value("SELECT max(desired_version) FROM rollout_device WHERE device_id = ?", (number,))
    return asked is not None and ours <= asked

"""Published releases in the database."""

from __future__ import annotations

import time
from collections.abc import Sequence

from kedge.fleet import drift
from kedge.fleet.database import Row, Session, note_change
from kedge.fleet.results import BundleView, ReleaseView
from kedge.fleet.storage import StoredBundle, StoredRelease
from kedge_protocol.candidates import allowed_ms
from kedge_protocol.errors import FleetError
from kedge_protocol.trust import ReleaseStatement, SignedBundle


def by_name(session: Session, name: str, version: str) -> Row | None:
    """Return the release with this name and version."""
    return session.row("SELECT * FROM release WHERE name = ? AND version = ?", (name, version))


def find(session: Session, reference: str) -> Row:
    """Return the release ``NAME:VERSION``.

    Raises:
        FleetError: another form, or there is none; the message names those there are.
    """
    name, colon, version = reference.rpartition(":")
    if not colon or not name or not version:
        raise FleetError(f"{reference!r} is not a release", remedy="Give NAME:VERSION, such as digits:1.0")
    release = by_name(session, name, version)
    if release is None:
        latest = session.rows("SELECT name, version FROM release ORDER BY id DESC LIMIT 10")
        there = [f"{row['name']}:{row['version']}" for row in reversed(latest)]
        raise FleetError(f"there is no release {reference}", remedy=f"Published are: {', '.join(there) or 'none'}")
    return release


def refuse_conflict(session: Session, name: str, version: str, digest: str) -> Row | None:
    """Return the same release if it is already published.

    Raises:
        FleetError: the name and version are taken by another release.
    """
    known = by_name(session, name, version)
    if known is not None and known["digest"] != digest:
        raise FleetError(
            f"{name}:{version} was published already with digest {known['digest']}; this one has {digest}",
            remedy="A published version never changes: compile with another --version",
        )
    return known


def record(session: Session, stored: StoredRelease) -> int:
    """Record a release whose blobs are in the repository; return its number."""
    number = session.insert(
        "INSERT INTO release (name, version, digest, published_at) VALUES (?, ?, ?, ?)",
        (stored.name, stored.version, stored.digest, session.now()),
    )
    for target, several in sorted(stored.candidates.items()):
        for place, bundle in enumerate(several):
            _record_bundle(session, number, target, bundle, place)
    note_change(session)
    return number


def statement(stored: StoredRelease) -> ReleaseStatement:
    """Return what the release key signs of a release."""
    bundles = (
        SignedBundle(target=bundle.bundle.config.target, digest=bundle.bundle.digest)
        for _, several in sorted(stored.candidates.items())
        for bundle in several
    )
    return ReleaseStatement(name=stored.name, version=stored.version, bundles=tuple(bundles), at=time.time())


def keep_statement(session: Session, release: int, signed: bytes) -> None:
    """Keep the signed statement of a release, in place of an earlier one."""
    session.run("UPDATE release SET statement = ? WHERE id = ?", (signed, release))
    note_change(session)


def statements(session: Session) -> dict[int, bytes]:
    """Return release → its signed statement, of those that have one."""
    rows = session.rows("SELECT id, statement FROM release WHERE statement IS NOT NULL")
    return {row["id"]: row["statement"] for row in rows}


def _record_bundle(session: Session, release: int, target: str, stored: StoredBundle, place: int) -> None:
    bundle = stored.bundle
    number = session.insert(
        "INSERT INTO bundle (release_id, target, digest, size, backend, precision, drift, preference, max_latency)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            release,
            target,
            bundle.digest,
            len(bundle.raw),
            bundle.config.backend,
            bundle.config.precision,
            drift.document(bundle.config.drift),
            place,
            allowed_ms(bundle.config),
        ),
    )
    blobs = {blob.digest: blob.size for blob in stored.blobs}
    session.run_many("INSERT INTO blob VALUES (?, ?) ON CONFLICT (digest) DO NOTHING", list(blobs.items()))
    session.run_many("INSERT INTO bundle_blob VALUES (?, ?)", [(number, digest) for digest in blobs])


def remove(session: Session, release: Row) -> None:
    """Remove a release. :func:`forget_blobs` removes the blobs that nothing else needs.

    Raises:
        FleetError: a device is to have one of its bundles.
    """
    query = """
        SELECT DISTINCT name FROM (
            SELECT device_id, digest FROM desired_model UNION ALL SELECT device_id, digest FROM desired_shadow
        ) AS wanted JOIN bundle ON bundle.digest = wanted.digest JOIN device ON device.id = device_id
        WHERE release_id = :release AND NOT EXISTS (
            SELECT 1 FROM bundle AS same WHERE same.digest = bundle.digest AND same.release_id <> :release
        ) ORDER BY name
    """
    users = [row["name"] for row in session.rows(query, {"release": release["id"]})]
    reference = f"{release['name']}:{release['version']}"
    if users:
        shown = ", ".join(users[:5]) + (f" and {len(users) - 5} more" if len(users) > 5 else "")
        raise FleetError(
            f"{reference} cannot be removed: {len(users)} device{'s' * (len(users) != 1)} shall run it ({shown})",
            remedy="Roll out another release to them first, or revert",
        )
    _refuse_while_rolling_out(session, release, reference)
    of_release = "(SELECT id FROM bundle WHERE release_id = ?)"
    session.run(f"DELETE FROM bundle_blob WHERE bundle_id IN {of_release}", (release["id"],))
    session.run("DELETE FROM bundle WHERE release_id = ?", (release["id"],))
    session.run("DELETE FROM release WHERE id = ?", (release["id"],))
    note_change(session)


def _refuse_while_rolling_out(session: Session, release: Row, reference: str) -> None:
    """Refuse to remove what a staged rollout has yet to bring to devices, or may have to take them back to."""
    coming = session.value(
        "SELECT rollout_id FROM rollout_stage JOIN rollout ON rollout.id = rollout_id"
        " WHERE live > 0 AND phase NOT IN ('aborted', 'reverting') AND model = ? AND version = ?",
        (release["name"], release["version"]),
    )
    before = session.value(
        "SELECT part.rollout_id FROM rollout_device AS part JOIN rollout_stage ON live = 2"
        " AND rollout_stage.rollout_id = part.rollout_id JOIN bundle ON bundle.digest = part.previous"
        " WHERE release_id = ? AND superseded_by IS NULL",
        (release["id"],),
    )
    if coming is None:
        coming = session.value(
            "SELECT rollout_id FROM assignment JOIN rollout ON rollout.id = rollout_id"
            " JOIN rollout_device AS part USING (rollout_id, device_id) WHERE assignment.state = 'waiting'"
            " AND superseded_by IS NULL AND rollout.state = 'active' AND model = ? AND version = ?",
            (release["name"], release["version"]),
        )
    if coming is not None or before is not None:
        what = "is to bring it to further devices" if coming is not None else "may have to take devices back to it"
        raise FleetError(
            f"{reference} cannot be removed: rollout {before if coming is None else coming} {what}",
            remedy="Wait until it has ended, or abort it: kedge rollout abort",
        )


def forget_blobs(session: Session) -> None:
    """Delete the records of blobs that belong to no bundle."""
    session.run("DELETE FROM blob WHERE NOT EXISTS (SELECT 1 FROM bundle_blob WHERE bundle_blob.digest = blob.digest)")


def blobs(session: Session) -> set[str]:
    """Return all published blobs."""
    return {row["digest"] for row in session.rows("SELECT digest FROM blob")}


def versions(session: Session, digests: Sequence[str]) -> list[str]:
    """Return the release versions of these bundles, or the beginning of a digest."""
    query = (
        "SELECT bundle.digest, version FROM bundle JOIN release ON release.id = release_id WHERE bundle.digest IN {}"
    )
    known = {row["digest"]: row["version"] for row in session.where_in(query, digests)}
    return sorted({known.get(digest, digest[:19]) for digest in digests})


def views(session: Session, release: int | None = None) -> tuple[ReleaseView, ...]:
    """Return all releases, oldest first, or one of them."""
    query = """
        SELECT release.id, name, version, release.digest AS release_digest, published_at, target,
               bundle.digest, backend, precision,
               (SELECT coalesce(sum(blob.size), 0) FROM bundle_blob JOIN blob ON blob.digest = bundle_blob.digest
                WHERE bundle_id = bundle.id) AS total
        FROM release LEFT JOIN bundle ON bundle.release_id = release.id
        WHERE :release IS NULL OR release.id = :release ORDER BY release.id, target, preference
    """
    found: dict[int, list[Row]] = {}
    for row in session.rows(query, {"release": release}):
        found.setdefault(row["id"], []).append(row)
    return tuple(_view(rows) for rows in found.values())


def _view(rows: list[Row]) -> ReleaseView:
    return ReleaseView(
        name=rows[0]["name"],
        version=rows[0]["version"],
        digest=rows[0]["release_digest"],
        published_at=rows[0]["published_at"],
        bundles=tuple(
            BundleView(
                target=row["target"],
                digest=row["digest"],
                backend=row["backend"],
                precision=row["precision"],
                total_bytes=row["total"],
            )
            for row in rows
            if row["target"] is not None
        ),
    )

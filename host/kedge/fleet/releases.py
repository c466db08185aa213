"""Published releases in the database."""

from __future__ import annotations

import time

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from kedge.fleet import tables
from kedge.fleet.database import note_change
from kedge.fleet.results import BundleView, ReleaseView
from kedge.repository.store import StoredBundle, StoredRelease
from kedge_protocol.errors import FleetError


def by_name(session: Session, name: str, version: str) -> tables.Release | None:
    """The release of this name and version."""
    query = select(tables.Release).where(tables.Release.name == name, tables.Release.version == version)
    return session.scalars(query).one_or_none()


def find(session: Session, reference: str) -> tables.Release:
    """The release ``NAME:VERSION``.

    Raises:
        FleetError: another form, or there is none; the message names those there are.
    """
    name, colon, version = reference.rpartition(":")
    if not colon or not name or not version:
        raise FleetError(f"{reference!r} is not a release", remedy="Give NAME:VERSION, such as digits:1.0")
    release = by_name(session, name, version)
    if release is None:
        there = [f"{row.name}:{row.version}" for row in everything(session)]
        raise FleetError(
            f"there is no release {reference}", remedy=f"Published are: {', '.join(there[-10:]) or 'none'}"
        )
    return release


def everything(session: Session) -> list[tables.Release]:
    """All releases, oldest first."""
    return list(session.scalars(select(tables.Release).order_by(tables.Release.id)))


def refuse_conflict(session: Session, name: str, version: str, digest: str) -> tables.Release | None:
    """The same release if it is there already.

    Raises:
        FleetError: the name and version are taken by another release.
    """
    known = by_name(session, name, version)
    if known is not None and known.digest != digest:
        raise FleetError(
            f"{name}:{version} was published already with digest {known.digest}; this one has {digest}",
            remedy="A published version never changes: compile with another --version",
        )
    return known


def record(session: Session, stored: StoredRelease) -> tables.Release:
    """Write down a release whose blobs are in the repository."""
    release = tables.Release(
        name=stored.name, version=stored.version, digest=stored.digest, published_at=time.time(), bundles=[]
    )
    for target, bundle in sorted(stored.bundles.items()):
        release.bundles.append(_bundle_row(session, target, bundle))
    session.add(release)
    note_change(session)
    session.flush()
    return release


def _bundle_row(session: Session, target: str, stored: StoredBundle) -> tables.Bundle:
    bundle = stored.bundle
    digests = dict.fromkeys(blob.digest for blob in stored.blobs)
    for blob in stored.blobs:
        session.merge(tables.Blob(digest=blob.digest, size=blob.size))
    return tables.Bundle(
        target=target,
        digest=bundle.digest,
        size=len(bundle.raw),
        backend=bundle.config.backend,
        precision=bundle.config.precision,
        blobs=[tables.BundleBlob(digest=digest) for digest in digests],
    )


def version_of(session: Session, bundle_digest: str) -> str:
    """The version of the release that a bundle belongs to, or the digest's beginning."""
    query = select(tables.Bundle).where(tables.Bundle.digest == bundle_digest).limit(1)
    bundle = session.scalars(query).one_or_none()
    return bundle_digest[:19] if bundle is None else bundle.release.version


def view(session: Session, release: tables.Release) -> ReleaseView:
    """The release for those who ask."""
    return ReleaseView(
        name=release.name,
        version=release.version,
        digest=release.digest,
        published_at=release.published_at,
        bundles=tuple(
            BundleView(
                target=bundle.target,
                digest=bundle.digest,
                backend=bundle.backend,
                precision=bundle.precision,
                total_bytes=_total(session, bundle),
            )
            for bundle in release.bundles
        ),
    )


def _total(session: Session, bundle: tables.Bundle) -> int:
    query = (
        select(func.coalesce(func.sum(tables.Blob.size), 0))
        .join(tables.BundleBlob, tables.BundleBlob.digest == tables.Blob.digest)
        .where(tables.BundleBlob.bundle_id == bundle.id)
    )
    return int(session.scalars(query).one())

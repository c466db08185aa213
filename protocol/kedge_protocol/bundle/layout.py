"""Reads an OCI image layout: releases and bundles by reference, blobs by digest, each checked on reading."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kedge_protocol import codec, digest, drift
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.config import SCHEMA_VERSION, BundleConfig
from kedge_protocol.errors import BundleError, MessageError

MAX_TITLE_BYTES = 128
_UNPRINTABLE = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Control characters, line separators, and lone surrogates."""


@dataclass(frozen=True)
class Bundle:
    """A view of one bundle: the manifest's own bytes are its identity.

    Attributes:
        digest: the digest of ``raw``.
        raw: the manifest as received.
        manifest, config: typed views.
        config_raw: the configuration blob as received.
    """

    digest: str
    raw: bytes
    manifest: oci.Manifest
    config: BundleConfig
    config_raw: bytes

    @property
    def files(self) -> dict[str, oci.Descriptor]:
        """Title → descriptor of every layer, including the golden vectors."""
        return {layer.title: layer for layer in self.manifest.layers}

    @property
    def model_bytes(self) -> int:
        """The size of the files that the device needs to run the model (without the golden vectors), in bytes."""
        return sum(layer.size for layer in self.manifest.layers if layer.media_type == oci.FILE_TYPE)

    @property
    def transfer_bytes(self) -> int:
        """The size of what a device pulls: manifest, configuration, and each different layer once, in bytes."""
        blobs = {self.digest: len(self.raw)}
        blobs |= {one.digest: one.size for one in (self.manifest.config, *self.manifest.layers)}
        return sum(blobs.values())


@dataclass(frozen=True)
class ReleaseView:
    """A view of one release.

    Attributes:
        digest: of its index; ``raw`` are the index's bytes.
        candidates: target → its bundles, in the compiler's order of preference. Usually one; of several each is by
            another backend, and a device's own measurement chooses.
    """

    digest: str
    raw: bytes
    name: str
    version: str
    candidates: dict[str, tuple[oci.Descriptor, ...]]

    @property
    def bundles(self) -> dict[str, oci.Descriptor]:
        """Target → the bundle that the compiler prefers."""
        return {target: several[0] for target, several in self.candidates.items()}


def of_backend(bundles: Sequence[Bundle], backend: str | None, *, where: str) -> tuple[Bundle, ...]:
    """Return the bundles by one backend; all of them if it is None.

    Raises:
        BundleError: there is none; the message names those that there are.
    """
    chosen = tuple(one for one in bundles if backend in (None, one.config.backend))
    if not chosen:
        there = ", ".join(one.config.backend for one in bundles)
        raise BundleError(
            f"has no bundle for {bundles[0].config.target} by {backend!r}", where=where, remedy=f"It has: {there}"
        )
    return chosen


def parse_manifest(raw: bytes, *, where: str) -> oci.Manifest:
    """Parse a bundle's manifest.

    Raises:
        BundleError: it is not a Kedge bundle, a digest is invalid, or a title is not a plain file name.
    """
    try:
        manifest = codec.decode(raw, oci.Manifest, where=where)
    except MessageError as error:
        raise BundleError(error.what, where=where) from error
    if manifest.artifact_type != oci.BUNDLE_TYPE:
        raise BundleError(f"artifactType {manifest.artifact_type!r} is no Kedge bundle", where=where)
    titles: set[str] = set()
    for layer in manifest.layers:
        checked_title(layer.title, where=where)
        if layer.title in titles:
            raise BundleError(f"two layers are named {layer.title!r}", where=where)
        titles.add(layer.title)
    for descriptor in (manifest.config, *manifest.layers):
        digest.checked(descriptor.digest, where=where)
        if descriptor.size < 0:
            raise BundleError(f"a size of {descriptor.size} bytes", where=where)
    return manifest


def parse_config(raw: bytes, *, where: str) -> BundleConfig:
    """Parse a bundle's configuration.

    Raises:
        BundleError: a field is missing or wrong, or the schema is newer than this Kedge reads.
    """
    try:
        data = codec.loads(raw, where=where)
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise BundleError(
                f"schema version {version!r} is not {SCHEMA_VERSION}",
                where=where,
                remedy="Update Kedge on this machine",
            )
        config = codec.structure(data, BundleConfig, where=where)
    except MessageError as error:
        raise BundleError(error.what, where=where) from error
    checked_title(config.entry, where=where)
    checked_title(config.golden.file, where=where)
    drift.check(config.drift or (), where=where)
    return config


def parse_bundle(raw: bytes, config_raw: bytes, *, where: str) -> Bundle:
    """Parse a bundle from the bytes of its manifest and configuration; the latter is checked against the former.

    Raises:
        BundleError: as in :func:`parse_manifest` and :func:`parse_config`; or the entry is not a layer.
        DigestMismatchError: the configuration is not the manifest's.
    """
    manifest = parse_manifest(raw, where=where)
    digest.verify_bytes(config_raw, manifest.config.digest, where=f"{where} config")
    config = parse_config(config_raw, where=f"{where} config")
    bundle = Bundle(digest.of_bytes(raw), raw, manifest, config, config_raw)
    for needed in (config.entry, config.golden.file):
        if needed not in bundle.files:
            raise BundleError(f"the file {needed!r} is not among its layers", where=where)
    if bundle.files[config.golden.file].digest != config.golden.digest:
        raise BundleError("the golden vectors' digest is not that of their layer", where=where)
    return bundle


def checked_title(title: str, *, where: str) -> str:
    """Return ``title`` if it is a plain file name, since it becomes one on the device.

    Raises:
        BundleError: it is empty, over 128 bytes of UTF-8, hidden, or contains a folder or a control character.
    """
    plain = PurePosixPath(title).name == title and "\\" not in title and not _UNPRINTABLE.search(title)
    if not title or not plain or title.startswith(".") or len(title.encode()) > MAX_TITLE_BYTES:
        raise BundleError(f"{title[:140]!r} is not a plain file name", where=where)
    return title


class Layout:
    """An OCI image layout on disk, for reading.

    Args:
        path: the folder with ``oci-layout``, ``index.json`` and ``blobs``.

    Raises:
        BundleError: there is no such folder, or it is not an image layout.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not (path / oci.LAYOUT_FILE).is_file() or not (path / "index.json").is_file():
            raise BundleError(
                "is not an OCI image layout" if path.exists() else "there is no such folder",
                where=str(path),
                remedy="Give the folder that `kedge compile -o` wrote",
            )
        self.index = self._index((path / "index.json").read_bytes(), "index.json")

    def _index(self, raw: bytes, where: str) -> oci.Index:
        try:
            return codec.decode(raw, oci.Index, where=f"{self.path}/{where}")
        except MessageError as error:
            raise BundleError(error.what, where=error.where) from error

    def blob_path(self, blob_digest: str) -> Path:
        """Return the path of a blob, which may not exist."""
        return self.path / "blobs" / "sha256" / digest.hex_of(blob_digest)

    def read(self, descriptor: oci.Descriptor) -> bytes:
        """Read a small blob and check its digest.

        Raises:
            BundleError: the blob is missing or does not have the descriptor's size.
            DigestMismatchError: the blob has other bytes.
        """
        path = self.blob_path(descriptor.digest)
        if not path.is_file():
            raise BundleError(f"blob {descriptor.digest} is missing", where=str(self.path))
        if path.stat().st_size != descriptor.size:
            raise BundleError(f"{path.stat().st_size} bytes, not {descriptor.size}", where=str(path))
        raw = path.read_bytes()
        digest.verify_bytes(raw, descriptor.digest, where=str(path))
        return raw

    def release(self) -> ReleaseView:
        """Read the release of this layout.

        Raises:
            BundleError: there is no release, or there are several.
        """
        found = [m for m in self.index.manifests if m.media_type == oci.INDEX_TYPE]
        if len(found) != 1:
            raise BundleError(f"holds {len(found)} releases, one was expected", where=str(self.path))
        raw = self.read(found[0])
        index = self._index(raw, found[0].digest)
        candidates: dict[str, tuple[oci.Descriptor, ...]] = {}
        for descriptor in index.manifests:
            target = descriptor.annotations.get(oci.TARGET)
            if not target:
                raise BundleError(f"{descriptor.digest} has no {oci.TARGET}", where=str(self.path))
            candidates[target] = (*candidates.get(target, ()), descriptor)
        return ReleaseView(
            found[0].digest,
            raw,
            index.annotations.get(oci.NAME, ""),
            index.annotations.get(oci.VERSION, ""),
            candidates,
        )

    def bundle(self, target: str) -> Bundle:
        """Read the release's bundle for one target; of several the one that the compiler prefers.

        Raises:
            BundleError: there is no such bundle; the message lists the existing ones.
        """
        return self.candidates(target)[0]

    def candidates(self, target: str) -> tuple[Bundle, ...]:
        """Read all bundles for one target, in the compiler's order of preference.

        Raises:
            BundleError: there is none; the message lists the existing targets.
        """
        release = self.release()
        if target not in release.candidates:
            there = ", ".join(sorted(release.candidates)) or "none"
            raise BundleError(f"has no bundle for {target!r}", where=str(self.path), remedy=f"It has: {there}")
        return tuple(map(self.read_bundle, release.candidates[target]))

    def read_bundle(self, descriptor: oci.Descriptor) -> Bundle:
        """Read a bundle by its manifest's descriptor."""
        raw = self.read(descriptor)
        where = f"{self.path} {descriptor.digest[:19]}"
        config_raw = self.read(parse_manifest(raw, where=where).config)
        return parse_bundle(raw, config_raw, where=where)

    def verify(self) -> None:
        """Check every blob that the release reaches, by size and digest.

        Raises:
            BundleError, DigestMismatchError: for the first invalid blob.
        """
        bundles = (one for several in self.release().candidates.values() for one in several)
        for layer in (layer for descriptor in bundles for layer in self.read_bundle(descriptor).manifest.layers):
            path = self.blob_path(layer.digest)
            if not path.is_file() or path.stat().st_size != layer.size:
                raise BundleError(f"blob {layer.digest} is missing or cut short", where=str(self.path))
            digest.verify_file(path, layer.digest)

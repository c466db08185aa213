"""Writes an OCI image layout: blobs, manifests, a release. The folder appears completely or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from kedge_protocol import blocks, codec, digest, files
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.layout import Bundle, checked_title
from kedge_protocol.errors import BundleError, StorageError


class LayoutWriter:
    """Fills the folder of one layout; :func:`new_layout` makes it appear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.candidates: dict[str, tuple[Bundle, ...]] = {}
        """Target → its bundles, in the order in which they were added."""
        self._descriptors: list[oci.Descriptor] = []
        (path / "blobs" / "sha256").mkdir(parents=True)

    def _blob(self, data: bytes) -> tuple[str, int]:
        name = digest.of_bytes(data)
        (self.path / "blobs" / "sha256" / digest.hex_of(name)).write_bytes(data)
        return name, len(data)

    def _file(self, title: str, source: Path, media_type: str) -> oci.Descriptor:
        checked_title(title, where=str(source))
        name = digest.of_file(source)
        target = self.path / "blobs" / "sha256" / digest.hex_of(name)
        if not target.exists():
            shutil.copyfile(source, target)
        size = target.stat().st_size
        annotations = {oci.TITLE: title}
        if size > blocks.BLOCK_SIZE:
            annotations[oci.BLOCKS] = digest.of_bytes(blocks.map_of_file(target))
        return oci.Descriptor(media_type=media_type, digest=name, size=size, annotations=annotations)

    def add_bundle(self, config: BundleConfig, files: Mapping[str, Path], golden: Path) -> oci.Descriptor:
        """Add one bundle. Of several for one target the first is the preferred one.

        Args:
            config: the bundle's configuration; ``config.golden.file`` names the golden vectors' layer.
            files: title → file, the model's files.
            golden: the golden vectors' file.

        Returns:
            The manifest's descriptor; its digest is the bundle's.

        Raises:
            BundleError: the target has a bundle by this backend already.
        """
        if any(one.config.backend == config.backend for one in self.candidates.get(config.target, ())):
            raise BundleError(f"two bundles by {config.backend} for {config.target}", where=str(self.path))
        layers = [self._file(title, path, oci.FILE_TYPE) for title, path in sorted(files.items())]
        layers.append(self._file(config.golden.file, golden, oci.GOLDEN_TYPE))
        config_raw = codec.encode(config)
        config_digest, config_size = self._blob(config_raw)
        manifest = oci.Manifest(
            schema_version=2,
            config=oci.Descriptor(media_type=oci.CONFIG_TYPE, digest=config_digest, size=config_size),
            layers=tuple(layers),
            artifact_type=oci.BUNDLE_TYPE,
            annotations={oci.NAME: config.name, oci.VERSION: config.version, oci.TARGET: config.target},
        )
        raw = codec.encode(oci.plain(manifest))
        name, size = self._blob(raw)
        bundle = Bundle(name, raw, manifest, config, config_raw)
        self.candidates[config.target] = (*self.candidates.get(config.target, ()), bundle)
        descriptor = oci.Descriptor(
            media_type=oci.MANIFEST_TYPE, digest=name, size=size, annotations={oci.TARGET: config.target}
        )
        self._descriptors.append(descriptor)
        return descriptor

    def add_release(self, name: str, version: str) -> oci.Descriptor:
        """Write the release of all added bundles, ``index.json`` and ``oci-layout``. This is the last call.

        Returns:
            The release's descriptor.
        """
        bundles = self._referenced(version)
        index = oci.Index(
            schema_version=2,
            manifests=tuple(descriptor for _, descriptor in bundles),
            annotations={oci.NAME: name, oci.VERSION: version},
        )
        release_digest, size = self._blob(codec.encode(oci.plain(index)))
        release = oci.Descriptor(
            media_type=oci.INDEX_TYPE,
            digest=release_digest,
            size=size,
            annotations={oci.REF_NAME: version, oci.NAME: name},
        )
        listed = [release]
        for reference, descriptor in bundles:
            annotations = {**descriptor.annotations, oci.REF_NAME: reference}
            listed.append(
                oci.Descriptor(
                    media_type=descriptor.media_type,
                    digest=descriptor.digest,
                    size=descriptor.size,
                    annotations=annotations,
                )
            )
        top = oci.Index(schema_version=2, manifests=tuple(listed))
        (self.path / "index.json").write_bytes(codec.encode(oci.plain(top)))
        (self.path / oci.LAYOUT_FILE).write_bytes(codec.encode({"imageLayoutVersion": "1.0.0"}))
        return release

    def _referenced(self, version: str) -> list[tuple[str, oci.Descriptor]]:
        """Return each bundle with its reference; those of a target with several also say their backend."""
        backends = {one.digest: one.config.backend for several in self.candidates.values() for one in several}
        found, named = [], set()
        for descriptor in self._descriptors:
            target, backend = descriptor.annotations[oci.TARGET], backends[descriptor.digest]
            reference = f"{version}-{target}" if target not in named else f"{version}-{target}-{backend}"
            if len(self.candidates[target]) > 1:
                annotations = {**descriptor.annotations, oci.BACKEND: backend}
                descriptor = replace(descriptor, annotations=annotations)
            named.add(target)
            found.append((reference, descriptor))
        return found


def check_place(path: Path, *, replace: bool) -> None:
    """Check that a layout may be written to ``path``: it does not exist, or, with ``replace``, is a layout or an empty
    folder.

    Raises:
        StorageError: something else is there, or ``replace`` is false.
    """
    if not os.path.lexists(path):
        return
    if not replace:
        raise StorageError(
            "exists already", where=str(path), remedy="Choose another folder, or ask for it to be replaced (--force)"
        )
    if not is_replaceable(path):
        raise StorageError(
            f"is no OCI image layout (it holds no {oci.LAYOUT_FILE}) and is not replaced",
            where=str(path),
            remedy="Choose another folder, or remove this one yourself",
        )


def is_replaceable(path: Path) -> bool:
    """Return whether replacing ``path`` loses nothing but a layout: it is a layout, or an empty folder."""
    try:
        return path.is_dir() and ((path / oci.LAYOUT_FILE).is_file() or not any(path.iterdir()))
    except OSError:
        return False


@contextlib.contextmanager
def new_layout(path: Path, *, replace: bool = False) -> Iterator[LayoutWriter]:
    """Fill a new layout beside ``path`` and move it into place if the block succeeds; otherwise it is removed.

    Args:
        replace: whether a layout or an empty folder at ``path`` is replaced (by rename, at the end; if the rename
            fails, the old folder is restored).

    Raises:
        StorageError: as in :func:`check_place`, or the disk is full or not writable.
    """
    check_place(path, replace=replace)
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        inner = staging / "layout"
        inner.mkdir()
        yield LayoutWriter(inner)
        _flush(inner)
        # Once more: something else may have come there meanwhile.
        check_place(path, replace=replace)
        _put_in_place(inner, path, aside=staging / "old")
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            remedy="Free space or choose another folder",
        ) from error
    finally:
        if staging is not None and (os.path.lexists(path) or not (staging / "old").exists()):
            shutil.rmtree(staging, ignore_errors=True)


def _put_in_place(new: Path, path: Path, *, aside: Path) -> None:
    """Rename ``new`` to ``path``; an existing folder is moved to ``aside`` and restored if that fails."""
    replaced = os.path.lexists(path)
    if replaced:
        path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        if replaced:
            try:
                aside.rename(path)
            except OSError as error:
                raise StorageError(
                    f"cannot be put in place: {error.strerror}; what was there lies in {aside}",
                    where=str(path),
                    remedy="Move it back",
                ) from error
        raise


def _flush(folder: Path) -> None:
    """Sync every file below ``folder``, so that the rename never exposes a release without its bytes."""
    for path in (folder, *sorted(folder.rglob("*"))):
        files.flush(path)

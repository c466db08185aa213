"""Writing an OCI image layout: blobs, manifests, a release. The folder appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from kedge_protocol import blocks, codec, digest
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.layout import checked_title
from kedge_protocol.errors import StorageError


class LayoutWriter:
    """Fills the folder of one layout; :func:`new_layout` makes it appear."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bundles: list[tuple[str, oci.Descriptor]] = []
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
        """Add one bundle.

        Args:
            config: its configuration; ``config.golden.file`` names the golden vectors' layer.
            files: title → file, the model's files.
            golden: the golden vectors' file.

        Returns:
            The manifest's descriptor; its digest is the bundle's.
        """
        layers = [self._file(title, path, oci.FILE_TYPE) for title, path in sorted(files.items())]
        layers.append(self._file(config.golden.file, golden, oci.GOLDEN_TYPE))
        config_digest, config_size = self._blob(codec.encode(config))
        manifest = oci.Manifest(
            schema_version=2,
            config=oci.Descriptor(media_type=oci.CONFIG_TYPE, digest=config_digest, size=config_size),
            layers=tuple(layers),
            artifact_type=oci.BUNDLE_TYPE,
            annotations={oci.NAME: config.name, oci.VERSION: config.version, oci.TARGET: config.target},
        )
        name, size = self._blob(codec.encode(oci.plain(manifest)))
        descriptor = oci.Descriptor(
            media_type=oci.MANIFEST_TYPE, digest=name, size=size, annotations={oci.TARGET: config.target}
        )
        self._bundles.append((f"{config.version}-{config.target}", descriptor))
        return descriptor

    def add_release(self, name: str, version: str) -> oci.Descriptor:
        """Write the release over all bundles added, ``index.json`` and ``oci-layout``; the last call.

        Returns:
            The release's descriptor.
        """
        index = oci.Index(
            schema_version=2,
            manifests=tuple(descriptor for _, descriptor in self._bundles),
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
        for reference, descriptor in self._bundles:
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
        (self.path / "oci-layout").write_bytes(codec.encode({"imageLayoutVersion": "1.0.0"}))
        return release


@contextlib.contextmanager
def new_layout(path: Path, *, replace: bool = False) -> Iterator[LayoutWriter]:
    """Fill a new layout beside ``path`` and put it in place when the block ends well; else nothing is left.

    Args:
        replace: whether an existing folder at ``path`` is replaced (by rename, at the end).

    Raises:
        StorageError: ``path`` exists and ``replace`` is false, or the disk is full or not writable.
    """
    if path.exists() and not replace:
        raise StorageError(
            "exists already", where=str(path), remedy="Choose another folder, or ask for it to be replaced"
        )
    staging: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        inner = staging / "layout"
        inner.mkdir()
        yield LayoutWriter(inner)
        _flush(inner)
        if path.exists():
            path.rename(staging / "old")
        inner.rename(path)
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}",
            where=str(path),
            remedy="Free space or choose another folder",
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Bring every file below ``folder`` to the disk, so that the rename never shows a release without its bytes."""
    for path in (folder, *sorted(folder.rglob("*"))):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

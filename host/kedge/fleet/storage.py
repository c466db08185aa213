"""Stores blobs and block maps on the controller's disk: ``blobs/sha256/HEX`` and ``maps/HEX``, both named by the blob's
digest.

A file there is complete and checked: it is written beside its place, synced and renamed. A blob of one block has no
map (see :mod:`kedge_protocol.blocks`).
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kedge_protocol import blocks, digest, files
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Bundle, Layout, ReleaseView
from kedge_protocol.errors import BundleError, DigestMismatchError, StorageError
from kedge_protocol.topics import checked_name

REPORT = "report.html"
"""Written beside the layout by ``kedge compile``."""
MAX_REPORT_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class StoredBlob:
    """A stored blob.

    Attributes:
        size: bytes.
        added: whether it was not there before.
    """

    digest: str
    size: int
    added: bool


@dataclass(frozen=True, kw_only=True)
class StoredBundle:
    """A stored bundle: its manifest's view and all its blobs, including the manifest and the configuration."""

    bundle: Bundle
    blobs: tuple[StoredBlob, ...]


@dataclass(frozen=True, kw_only=True)
class StoredRelease:
    """A stored release; ``candidates`` by target, in the compiler's order."""

    name: str
    version: str
    digest: str
    candidates: dict[str, tuple[StoredBundle, ...]]

    @property
    def bundles(self) -> tuple[StoredBundle, ...]:
        """All bundles."""
        return tuple(one for several in self.candidates.values() for one in several)


class Repository:
    """The store in a folder, created on the first write.

    Args:
        path: the state folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def blob_path(self, blob_digest: str) -> Path:
        """Return the path of a blob, which may not exist."""
        return self.path / "blobs" / "sha256" / digest.hex_of(blob_digest)

    def map_path(self, blob_digest: str) -> Path:
        """Return the path of a blob's map, which may not exist."""
        return self.path / "maps" / digest.hex_of(blob_digest)

    def report_path(self, release_digest: str) -> Path:
        """Return the path of a release's compile report, which may not exist."""
        return self.path / "reports" / f"{digest.hex_of(release_digest)}.html"

    def keep_report(self, layout: Layout, release_digest: str) -> None:
        """Keep the compile report of a layout, if it has one of a sensible size.

        Raises:
            StorageError: no space, or not writable.
        """
        source, path = layout.path / REPORT, self.report_path(release_digest)
        if not source.is_file() or source.stat().st_size > MAX_REPORT_BYTES:
            return
        with _storage_errors(path), _new_file(path) as file:
            file.write(source.read_bytes())

    def collect(self, kept: Collection[str]) -> dict[str, int]:
        """Delete every blob and map except those of ``kept``, including remains of interrupted publications. Nobody may
        add blobs meanwhile.

        Returns:
            The deleted blobs and their bytes.

        Raises:
            StorageError: one cannot be deleted.
        """
        names = {digest.hex_of(one) for one in kept}
        removed = {}
        with _storage_errors(self.path):
            for path in (self.path / "blobs" / "sha256").glob("*"):
                if path.name not in names:
                    removed[f"sha256:{path.name}"] = path.stat().st_size
                    path.unlink()
            for path in (self.path / "maps").glob("*"):
                if path.name not in names:
                    path.unlink()
        return removed

    def missing(self, blobs: Mapping[str, int]) -> list[str]:
        """Return which of these blobs (digest → bytes) are missing or incomplete."""
        found = []
        for blob, size in blobs.items():
            path = self.blob_path(blob)
            if not path.is_file() or path.stat().st_size != size:
                found.append(blob)
        return found

    def add(self, layout: Layout) -> StoredRelease:
        """Add the release of a layout, checking every blob. Adding it again changes nothing.

        Raises:
            BundleError: not a release of Kedge, a blob missing or cut short, bundles that do not belong to the
                release, a block map that is missing or is not the blob's.
            DigestMismatchError: a blob's bytes are not what its digest says.
            StorageError: no space, or not writable.
        """
        view = layout.release()
        if not view.bundles:
            raise BundleError("the release holds no bundle", where=str(layout.path))
        several = {target: tuple(map(layout.read_bundle, found)) for target, found in view.candidates.items()}
        for target, bundles in several.items():
            _check_belonging(view, target, bundles, where=str(layout.path))
        stored = {
            target: tuple(self._add_bundle(layout, bundle) for bundle in bundles) for target, bundles in several.items()
        }
        return StoredRelease(name=view.name, version=view.version, digest=view.digest, candidates=stored)

    def _add_bundle(self, layout: Layout, bundle: Bundle) -> StoredBundle:
        where = f"{layout.path} {bundle.config.target}"
        done = []
        for layer in bundle.manifest.layers:
            done.append(self._add_layer(layout.blob_path(layer.digest), layer, where=f"{where} {layer.title}"))
        # The manifest comes last: whoever finds it finds all that it names.
        done.append(self.add_bytes(bundle.config_raw))
        done.append(self.add_bytes(bundle.raw))
        return StoredBundle(bundle=bundle, blobs=tuple(done))

    def _add_layer(self, source: Path, layer: oci.Descriptor, *, where: str) -> StoredBlob:
        announced = layer.annotations.get(oci.BLOCKS)
        if layer.size > blocks.BLOCK_SIZE and announced is None:
            raise BundleError(
                f"has {layer.size} bytes and no {oci.BLOCKS}",
                where=where,
                remedy="Compile the release again with this version of Kedge",
            )
        try:
            with source.open("rb") as file:
                return self._add_stream(file, layer.digest, layer.size, announced, where=where)
        except FileNotFoundError as error:
            raise BundleError(f"blob {layer.digest} is missing", where=where) from error

    def add_bytes(self, data: bytes) -> StoredBlob:
        """Add a small blob."""
        import io

        return self._add_stream(io.BytesIO(data), digest.of_bytes(data), len(data), None, where="blob")

    def _add_stream(self, file: BinaryIO, name: str, size: int, announced: str | None, *, where: str) -> StoredBlob:
        """Copy, hash and map in one pass. An existing blob is not written again, but its source is checked."""
        target = self.blob_path(name)
        present = target.is_file() and target.stat().st_size == size
        whole, hashes, read = hashlib.sha256(), bytearray(), 0
        with _storage_errors(target), contextlib.ExitStack() as stack:
            output = None if present else stack.enter_context(_new_file(target))
            while block := file.read(blocks.BLOCK_SIZE):
                whole.update(block)
                hashes += blocks.block_hash(block)
                read += len(block)
                if output is not None:
                    output.write(block)
            if read != size:
                raise BundleError(f"blob {name} has {read} bytes, not {size}", where=where)
            if (actual := "sha256:" + whole.hexdigest()) != name:
                raise DigestMismatchError(f"has digest {actual}, not {name}", where=where)
            if announced is not None and digest.of_bytes(hashes) != announced:
                raise BundleError(f"its block map is not the announced {announced}", where=where)
            self._write_map(name, bytes(hashes))
        return StoredBlob(digest=name, size=size, added=not present)

    def _write_map(self, name: str, hashes: bytes) -> None:
        path = self.map_path(name)
        if len(hashes) <= blocks.HASH_SIZE or (path.is_file() and path.read_bytes() == hashes):
            return
        with _new_file(path) as file:
            file.write(hashes)


def _check_belonging(view: ReleaseView, target: str, bundles: Sequence[Bundle], *, where: str) -> None:
    checked_name(view.name, "release name")
    checked_name(view.version, "release version")
    checked_name(target, "target name")
    if len({bundle.config.backend for bundle in bundles}) < len(bundles):
        raise BundleError(f"holds two bundles for {target} by the same backend", where=where)
    for bundle in bundles:
        config = bundle.config
        if (config.name, config.version, config.target) != (view.name, view.version, target):
            raise BundleError(
                f"the bundle listed for {view.name}:{view.version} {target} says that it is"
                f" {config.name}:{config.version} {config.target}",
                where=where,
            )


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears at ``path``, synced, when the block ends well; else nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.new_file(path, mode=0o600) as file:
        yield file


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}", where=str(path), remedy="Free space or choose another --state"
        ) from error

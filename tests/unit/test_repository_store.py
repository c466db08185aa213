"""The repository takes in what is sound, whole, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle

from kedge.fleet.storage import Repository
from kedge_protocol import blocks, digest
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import BundleError, ConfigError, DigestMismatchError, KedgeError, StorageError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("made"), target=["rpi4", "generic-cpu"], mebibytes=0.5)


@pytest.fixture
def release(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "release"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_blob_and_every_map_lie_there_by_digest(release: Path, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "state")
    stored = repository.add(Layout(release))
    assert (stored.name, stored.version) == ("tiny", "1.0")
    assert set(stored.candidates) == {"rpi4", "generic-cpu"}
    several = 0
    for bundle in stored.bundles:
        named = {layer.digest for layer in bundle.bundle.manifest.layers}
        named |= {bundle.bundle.digest, bundle.bundle.manifest.config.digest}
        assert {blob.digest for blob in bundle.blobs} == named
        for blob in bundle.blobs:
            path = repository.blob_path(blob.digest)
            digest.verify_file(path, blob.digest)
            assert path.stat().st_size == blob.size
            if blob.size > blocks.BLOCK_SIZE:
                several += 1
                assert repository.map_path(blob.digest).read_bytes() == blocks.map_of_file(path)
            else:
                assert not repository.map_path(blob.digest).exists()
    assert several == 2


def test_taking_in_again_changes_nothing_and_mends_what_is_missing(release: Path, tmp_path: Path) -> None:
    repository = Repository(tmp_path / "state")
    first = repository.add(Layout(release))
    before = files(tmp_path / "state")
    again = repository.add(Layout(release))
    assert files(tmp_path / "state") == before
    assert not any(blob.added for bundle in again.bundles for blob in bundle.blobs)
    entry = first.candidates["rpi4"][0].bundle.files["model.onnx"].digest
    repository.blob_path(entry).unlink()
    repository.map_path(entry).write_bytes(b"damaged")
    repository.add(Layout(release))
    assert files(tmp_path / "state") == before


def damage(release: Path, how: str) -> None:
    model = Layout(release).bundle("rpi4").files["model.onnx"]
    path = Layout(release).blob_path(model.digest)
    raw = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(raw[:-1])
    elif how == "longer":
        path.write_bytes(raw + b"!")
    else:
        path.write_bytes(raw[:1000] + bytes([raw[1000] ^ 1]) + raw[1001:])


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ("missing", BundleError, "is missing"),
        ("cut", BundleError, "bytes, not"),
        ("longer", BundleError, "bytes, not"),
        ("flipped", DigestMismatchError, "has digest"),
    ],
)
def test_a_damaged_blob_is_refused_and_leaves_nothing_of_itself(
    release: Path, tmp_path: Path, how: str, error: type[KedgeError], text: str
) -> None:
    name = Layout(release).bundle("rpi4").files["model.onnx"].digest
    damage(release, how)
    repository = Repository(tmp_path / "state")
    with pytest.raises(error, match=text):
        repository.add(Layout(release))
    assert not repository.blob_path(name).exists()
    assert not list((tmp_path / "state").rglob(".new-*"))


def rewrite(release: Path, change: str) -> None:
    """Another manifest for rpi4, with all digests above it made right again."""
    layout = Layout(release)
    view = layout.release()
    bundle = layout.bundle("rpi4")
    manifest = json.loads(bundle.raw)
    for layer in manifest["layers"]:
        if change == "map" and oci.BLOCKS in layer.get("annotations", {}):
            layer["annotations"][oci.BLOCKS] = "sha256:" + "0" * 64
        elif change == "no map":
            layer.get("annotations", {}).pop(oci.BLOCKS, None)
    index = json.loads(view.raw)
    if change == "name":
        index["annotations"][oci.NAME] = "other"
    elif change == "bad name":
        index["annotations"][oci.NAME] = "../other"
    elif change == "empty":
        index["manifests"] = []

    def put(document: object) -> tuple[str, int]:
        raw = json.dumps(document).encode()
        name = digest.of_bytes(raw)
        layout.blob_path(name).write_bytes(raw)
        return name, len(raw)

    for listed in index["manifests"]:
        if listed["annotations"][oci.TARGET] == "rpi4":
            listed["digest"], listed["size"] = put(manifest)
    top = json.loads((release / "index.json").read_bytes())
    for listed in top["manifests"]:
        if listed["mediaType"] == oci.INDEX_TYPE:
            listed["digest"], listed["size"] = put(index)
    (release / "index.json").write_text(json.dumps(top), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ("map", BundleError, "block map is not the announced"),
        ("no map", BundleError, "and no io.kedge.blocks"),
        ("name", BundleError, "says that it is tiny:1.0 rpi4"),
        ("bad name", ConfigError, "not a usable release name"),
        ("empty", BundleError, "holds no bundle"),
    ],
)
def test_a_release_that_contradicts_itself_is_refused(
    release: Path, tmp_path: Path, change: str, error: type[KedgeError], text: str
) -> None:
    rewrite(release, change)
    with pytest.raises(error, match=text):
        Repository(tmp_path / "state").add(Layout(release))


def test_a_place_that_cannot_be_written_is_one_clear_error(release: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        Repository(release / "index.json" / "state").add(Layout(release))

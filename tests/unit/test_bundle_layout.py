"""Bundles on disk: what is written is read, bytes are identity, nothing half-made is left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.bundles import make_bundle

from kedge_protocol import blocks, codec, digest
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Layout, checked_title, parse_bundle, parse_config, parse_manifest
from kedge_protocol.bundle.write import new_layout
from kedge_protocol.errors import BundleError, DigestMismatchError, StorageError

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("bundle"), target=("generic-cpu", "rpi4"), mebibytes=0.2)


def test_the_index_lists_the_release_and_each_bundle_by_reference(release: Path) -> None:
    index = json.loads((release / "index.json").read_bytes())
    listed = {entry["annotations"][oci.REF_NAME]: entry["mediaType"] for entry in index["manifests"]}
    assert listed == {"1.0": oci.INDEX_TYPE, "1.0-generic-cpu": oci.MANIFEST_TYPE, "1.0-rpi4": oci.MANIFEST_TYPE}
    assert json.loads((release / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}


def test_every_blob_is_named_by_its_digest(release: Path) -> None:
    for path in (release / "blobs" / "sha256").iterdir():
        assert digest.of_file(path) == f"sha256:{path.name}"


def test_layers_of_more_than_one_block_carry_their_map(release: Path) -> None:
    layout = Layout(release)
    for layer in layout.bundle("rpi4").manifest.layers:
        annotated = layer.annotations.get(oci.BLOCKS)
        assert (annotated is not None) == (layer.size > blocks.BLOCK_SIZE)
        if annotated is not None:
            assert annotated == digest.of_bytes(blocks.map_of_file(layout.blob_path(layer.digest)))


def test_a_view_keeps_the_bytes_that_came(release: Path) -> None:
    layout = Layout(release)
    bundle = layout.bundle("generic-cpu")
    assert digest.of_bytes(bundle.raw) == bundle.digest == layout.release().bundles["generic-cpu"].digest
    assert digest.of_bytes(bundle.config_raw) == bundle.manifest.config.digest


names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=20)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(unknown=st.dictionaries(names.map("x-".__add__), values, max_size=4))
def test_fields_that_this_version_does_not_know_survive(release: Path, unknown: dict[str, object]) -> None:
    bundle = Layout(release).bundle("rpi4")
    config_raw = json.dumps({**json.loads(bundle.config_raw), **unknown}).encode()
    manifest = json.loads(bundle.raw)
    manifest["config"] |= {"digest": digest.of_bytes(config_raw), "size": len(config_raw)}
    raw = json.dumps({**manifest, **unknown}, indent=1).encode()
    view = parse_bundle(raw, config_raw, where="test")
    assert view.config == bundle.config
    assert (view.raw, view.config_raw) == (raw, config_raw)
    assert view.digest == digest.of_bytes(raw)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_changed_byte_of_a_blob_goes_unseen(release: Path, data: st.DataObject) -> None:
    layout = Layout(release)
    view = layout.bundle("rpi4")
    path = data.draw(st.sampled_from([layout.blob_path(view.digest), layout.blob_path(view.manifest.config.digest)]))
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        with pytest.raises(DigestMismatchError):
            Layout(release).bundle("rpi4")
    finally:
        path.write_bytes(whole)


def test_verify_finds_a_damaged_layer(tmp_path: Path) -> None:
    layout = Layout(make_bundle(tmp_path))
    layout.verify()
    path = layout.blob_path(layout.bundle("generic-cpu").files["model.onnx"].digest)
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DigestMismatchError):
        layout.verify()
    path.write_bytes(raw[:-1])
    with pytest.raises(BundleError, match="cut short"):
        layout.verify()


@given(st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
def test_what_is_no_bundle_is_an_error_of_our_own(raw: bytes) -> None:
    with pytest.raises(BundleError):
        parse_manifest(raw, where="test")
    with pytest.raises(BundleError):
        parse_config(raw, where="test")


@pytest.mark.parametrize(
    "title",
    ["", ".", "..", "../x", "a/b", "/etc/passwd", ".hidden", "a\\b", "a\0b", "x" * 129, "a/", "ä" * 65, "a\nb",
     "a\x1b[31m", "\x7f", "a\x85", "a\u2028b", "a\udc80", "\ud800"],
)  # fmt: skip
def test_a_title_that_is_no_plain_file_name_is_refused(title: str) -> None:
    with pytest.raises(BundleError, match="plain file name"):
        checked_title(title, where="test")


@pytest.mark.parametrize("title", ["model.onnx", "a b.bin", "größe.tflite", "模型" * 21, "x" * 128])
def test_a_plain_file_name_passes(title: str) -> None:
    assert checked_title(title, where="test") == title


@pytest.mark.parametrize("where", ["manifest title", "config entry", "golden file"])
def test_no_file_of_a_bundle_leaves_its_folder(release: Path, where: str) -> None:
    bundle = Layout(release).bundle("rpi4")
    manifest, config = json.loads(bundle.raw), json.loads(bundle.config_raw)
    if where == "manifest title":
        manifest["layers"][0]["annotations"][oci.TITLE] = "../../evil"
    elif where == "config entry":
        config["entry"] = "../evil"
    else:
        config["golden"]["file"] = "/evil"
    config_raw = json.dumps(config).encode()
    manifest["config"] |= {"digest": digest.of_bytes(config_raw), "size": len(config_raw)}
    with pytest.raises(BundleError):
        parse_bundle(json.dumps(manifest).encode(), config_raw, where="test")


def test_a_newer_schema_says_what_to_do(release: Path) -> None:
    config = json.loads(Layout(release).bundle("rpi4").config_raw)
    with pytest.raises(BundleError, match="Update Kedge"):
        parse_config(json.dumps({**config, "schema_version": 2}).encode(), where="test")


def test_writing_the_same_gives_the_same_digests(tmp_path: Path) -> None:
    first, second = (make_bundle(tmp_path / name, target=("generic-cpu", "rpi4")) for name in "ab")
    assert Layout(first).release().digest == Layout(second).release().digest
    assert sorted(p.name for p in (first / "blobs" / "sha256").iterdir()) == sorted(
        p.name for p in (second / "blobs" / "sha256").iterdir()
    )


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fails() -> None:
        with new_layout(tmp_path / "OUT") as writer:
            (writer.path / "something").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fails()
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "OUT").mkdir()
    for name in ("old", oci.LAYOUT_FILE):
        (tmp_path / "OUT" / name).write_text("old")
    with pytest.raises(RuntimeError, match="midway"), new_layout(tmp_path / "OUT", replace=True):
        raise RuntimeError("midway")
    assert (tmp_path / "OUT" / "old").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_there_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "OUT").mkdir()
    with pytest.raises(StorageError, match="exists already"), new_layout(tmp_path / "OUT"):
        pytest.fail("never reached")


@pytest.mark.parametrize("kind", ["folder", "file", "link to a file", "link to nothing", "folder of that name"])
def test_only_a_layout_or_an_empty_folder_is_replaced(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "OUT"
    (tmp_path / "thesis.txt").write_text("years of work")
    if kind.startswith("folder"):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
        if kind == "folder of that name":
            (out / oci.LAYOUT_FILE).mkdir()
    elif kind == "file":
        out.write_text("years of work")
    else:
        out.symlink_to(tmp_path / ("thesis.txt" if kind == "link to a file" else "nothing"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="no OCI image layout"), new_layout(out, replace=True):
        pytest.fail("never reached")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_layout_and_an_empty_folder_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "OUT"
    out.mkdir()
    for text in ("first", "second"):
        with new_layout(out, replace=True) as writer:
            (writer.path / "text").write_text(text)
            writer.add_release("digits", "1.0")
        assert (out / "text").read_text() == text
        assert list(tmp_path.iterdir()) == [out]


def test_what_comes_to_the_place_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "OUT"

    def late() -> None:
        with new_layout(out, replace=True):
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(StorageError, match="no OCI image layout"):
        late()
    assert (out / "thesis.txt").read_text() == "years of work"
    assert list(tmp_path.iterdir()) == [out]


def test_the_old_layout_is_back_where_the_new_one_cannot_be_put_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "OUT"
    with new_layout(out) as writer:
        writer.add_release("digits", "1.0")
    index = (out / "index.json").read_bytes()
    rename = Path.rename

    def fails_for_the_new(path: Path, target: Path) -> Path:
        if path.name == "layout":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(StorageError, match="No space left"), new_layout(out, replace=True) as writer:
        writer.add_release("digits", "2.0")
    assert (out / "index.json").read_bytes() == index
    assert list(tmp_path.iterdir()) == [out]


def test_configurations_are_encoded_canonically(release: Path) -> None:
    bundle = Layout(release).bundle("rpi4")
    assert codec.encode(bundle.config) == bundle.config_raw


def test_a_release_may_hold_several_bundles_of_a_target_in_their_order(tmp_path: Path) -> None:
    path = make_bundle(tmp_path, target=("board", "rpi4"), also={"openvino": None})
    layout = Layout(path)
    several = layout.candidates("board")
    assert [one.config.backend for one in several] == ["onnxruntime", "openvino"]
    view = layout.release()
    assert [one.digest for one in view.candidates["board"]] == [one.digest for one in several]
    assert [one.annotations[oci.BACKEND] for one in view.candidates["board"]] == ["onnxruntime", "openvino"]
    assert view.bundles["board"].digest == several[0].digest == layout.bundle("board").digest
    index = json.loads((path / "index.json").read_bytes())
    named = {entry["annotations"][oci.REF_NAME]: entry["digest"] for entry in index["manifests"]}
    assert named["1.0-board"] == several[0].digest
    assert named["1.0-board-openvino"] == several[1].digest
    layout.verify()
    victim = layout.blob_path(several[1].config.golden.digest)
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(BundleError, match="cut short"):
        layout.verify()


def test_one_bundle_of_a_target_says_nothing_of_its_backend(release: Path) -> None:
    for (descriptor,) in Layout(release).release().candidates.values():
        assert set(descriptor.annotations) == {oci.TARGET}


def test_two_bundles_of_a_target_by_one_backend_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="two bundles by onnxruntime for board"):
        make_bundle(tmp_path, target=("board", "board"))

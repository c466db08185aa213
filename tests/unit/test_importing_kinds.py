"""What a user's MODEL is, told by its name; what cannot be read is said with what to give in its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.lowering import classifier

from kedge.importing import api, model_kinds, transformers_folder
from kedge.importing.model_kinds import Factory, Kind
from kedge.importing.worker_messages import ImportRequest
from kedge.importing.worker_tasks import import_model
from kedge_protocol.errors import ConfigError, MissingDependencyError, ModelError
from kedge_targets import registry
from kedge_targets.importer import Importer


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody hears."""


def test_a_factory_in_a_file_and_in_a_module() -> None:
    assert model_kinds.factory("nets/model.py:build") == Factory("nets/model.py", "build")
    assert model_kinds.factory("nets.model:build") == Factory("nets.model", "build")
    assert model_kinds.factory("model.onnx") is None
    assert model_kinds.factory("/data/a:b/model.onnx") is None


def test_a_path_with_a_colon_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("net:v1").touch()
    assert model_kinds.factory("net:v1") is None
    assert model_kinds.absolute("net:v1") == str(tmp_path / "net:v1")


def test_paths_become_absolute_and_module_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert model_kinds.absolute("net.py:build") == f"{tmp_path}/net.py:build"
    assert model_kinds.absolute("nets.model:build") == "nets.model:build"
    assert model_kinds.absolute("a.onnx") == str(tmp_path / "a.onnx")


@pytest.mark.parametrize(
    ("name", "kind"), [("m.onnx", Kind.ONNX), ("m.pt2", Kind.EXPORTED), ("M.KERAS", Kind.KERAS), ("m", Kind.UNKNOWN)]
)
def test_suffixes(tmp_path: Path, name: str, kind: Kind) -> None:
    path = tmp_path / name
    path.touch()
    assert model_kinds.recognise(str(path)) is kind


def test_a_saved_model_is_known_by_what_lies_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="none that can be read"):
        model_kinds.recognise(str(tmp_path))
    (tmp_path / "saved_model.pb").touch()
    found = model_kinds.recognise(str(tmp_path))
    assert isinstance(found, Importer)
    assert found.kind(tmp_path) == "TensorFlow SavedModel"


def test_every_importer_says_what_it_reads() -> None:
    for importer in registry.importers():
        assert importer.reads
        assert all(words in model_kinds.readable() for words in importer.reads)


@pytest.mark.parametrize(
    ("name", "what", "remedy"),
    [
        ("m.pt", "pickle", "FILE.py:FACTORY"),
        ("m.pth", "pickle", ".pt2"),
        ("m.pkl", "pickle", "FILE.py:FACTORY"),
        ("m.safetensors", "without a network", "FILE.py:FACTORY"),
        ("m.h5", "old format", ".keras"),
        ("m.pb", "bare TensorFlow graph", "SavedModel"),
        ("m.py", "without a function's name", "FILE.py:FACTORY"),
    ],
)
def test_what_is_never_loaded(tmp_path: Path, name: str, what: str, remedy: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"anything")
    with pytest.raises(ModelError, match=what) as caught:
        model_kinds.recognise(str(path))
    assert caught.value.where == str(path)
    assert remedy in (caught.value.remedy or "")


@pytest.mark.parametrize("source", ["/nowhere/m.onnx", "/nowhere/net.py:build"])
def test_no_such_file(source: str) -> None:
    with pytest.raises(ModelError, match="there is no such file"):
        model_kinds.recognise(source)


def test_onnx_is_passed_on_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(classifier().SerializeToString())
    made = import_model(api.request(path, workdir=tmp_path / "work"), silent)
    assert made.graph == str(path)
    assert made.kind == "ONNX"
    assert made.size_bytes == path.stat().st_size
    assert not made.notes


def test_onnx_without_its_suffix(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(classifier().SerializeToString())
    assert import_model(api.request(path, workdir=tmp_path / "work"), silent).graph == str(path)


def test_a_photograph(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"\xff\xd8\xff\xe0 a photograph")
    with pytest.raises(ModelError, match="is not an ONNX model, and its suffix is of no other kind"):
        import_model(api.request(path, workdir=tmp_path / "work"), silent)


def test_the_batch_of_an_onnx_file_is_fixed_on_request(tmp_path: Path) -> None:
    from kedge_targets.graph import batch, model_reader

    path, work = tmp_path / "m.onnx", tmp_path / "work"
    path.write_bytes(classifier().SerializeToString())
    made = import_model(api.request(path, workdir=work, batch=1), silent)
    assert made.notes == ("batch fixed to 1 on request",)
    assert batch.size(model_reader.read(Path(made.graph))) == 1
    assert batch.size(model_reader.read(path)) is None


def test_a_batch_that_is_fixed_already_cannot_be_another(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(classifier(batch=2).SerializeToString())
    with pytest.raises(ModelError, match="fixed to 2"):
        import_model(api.request(path, workdir=tmp_path / "work", batch=1), silent)


def test_no_batch_below_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no batch"):
        api.request("m.onnx", workdir=tmp_path, batch=0)


def test_two_samples_of_each_input_go_along(tmp_path: Path) -> None:
    made = api.request("m.onnx", workdir=tmp_path, inputs={"a/b": np.arange(12).reshape(6, 2)})
    assert isinstance(made, ImportRequest)
    assert np.load(made.inputs["a/b"]).tolist() == [[0, 1], [2, 3]]


def test_an_object_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dict is no model"):
        api.request({"a": 1}, workdir=tmp_path)


@pytest.mark.parametrize(
    ("config", "weights", "said"),
    [
        ('{"architectures": ["GPT2LMHeadModel"]}', True, "GPT2LMHeadModel generates"),
        ('{"architectures": ["BertModel"]}', False, r"holds no \.safetensors"),
        ("{}", True, "names no architecture"),
        ("no json", True, r"its config\.json cannot be read"),
    ],
)
def test_a_hugging_face_folder_is_looked_at_before_anything_is_loaded(
    tmp_path: Path, config: str, weights: bool, said: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "model.safetensors").touch()
    assert model_kinds.recognise(str(tmp_path)) is Kind.TRANSFORMERS
    with pytest.raises(ModelError, match=said):
        transformers_folder.check(tmp_path)


def test_a_hugging_face_folder_wants_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(transformers_folder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install transformers"):
        transformers_folder.check(tmp_path)

"""``kedge_agent.Model`` on real bundles: what it takes, what it gives, what it refuses."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.support.bundles import CLASSES, HIDDEN, make_bundle, make_tflite_bundle, samples
from tests.support.installed import install

from kedge_agent import BundleError, InputError, Model, VerificationError
from kedge_agent.counters import collect
from kedge_protocol import golden
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.bundle.layout import Layout
from kedge_targets.executor import Executor

pytestmark = pytest.mark.device


def _golden(release: Path, target: str = "generic-cpu") -> golden.Golden:
    layout = Layout(release)
    return golden.load(layout.blob_path(layout.bundle(target).config.golden.digest))


@pytest.mark.parametrize("preprocess", [None, Preprocess(scale=(2.0,), mean=(0.5,), std=(3.0,))])
@pytest.mark.parametrize("batch", [None, 1, 2])
def test_a_release_folder_gives_the_golden_outputs(
    tmp_path: Path, preprocess: Preprocess | None, batch: int | None
) -> None:
    release = make_bundle(tmp_path, labels=("a", "b", "c", "d"), preprocess=preprocess, batch=batch)
    expected = _golden(release)
    with Model(release, target="generic-cpu") as model:
        result = model(expected.inputs["input"])
        golden.require(golden.compare(expected, {"scores": result}), where="test")
        assert (model.name, model.version, model.labels) == ("tiny", "1.0", ("a", "b", "c", "d"))
        assert model.digest == Layout(release).bundle("generic-cpu").digest
        assert [spec.name for spec in model.inputs] == ["input"]
        assert [spec.name for spec in model.outputs] == ["scores"]
        assert model.config.target == "generic-cpu"


def test_one_sample_needs_no_batch_axis(tmp_path: Path) -> None:
    model = Model(make_bundle(tmp_path), target="generic-cpu")
    batch = samples(3)
    one = model(batch[1])
    assert one.shape == (CLASSES,)
    np.testing.assert_allclose(one, model(batch)[1], rtol=1e-5)
    np.testing.assert_array_equal(one, model(batch[1].tolist()))


def test_several_inputs_go_by_name(tmp_path: Path) -> None:
    model = Model(make_bundle(tmp_path, double=True), target="generic-cpu")
    batch, offset = samples(3), np.ones((3, CLASSES), dtype=np.float32)
    by_mapping = model({"input": batch, "offset": offset})
    by_keyword = model(offset=offset, input=batch)
    mixed = model({"input": batch}, offset=offset)
    assert by_mapping["scores"].shape == (3, CLASSES)
    assert by_mapping["hidden"].shape == (3, HIDDEN)
    for other in (by_keyword, mixed):
        np.testing.assert_array_equal(by_mapping["scores"], other["scores"])
    one = model(input=batch[0], offset=offset[0])
    assert one["scores"].shape == (CLASSES,)


def test_the_callers_arrays_are_not_changed(tmp_path: Path) -> None:
    model = Model(make_bundle(tmp_path, preprocess=Preprocess(mean=(1.0,))), target="generic-cpu")
    given = samples(4)
    before = given.copy()
    model(given)
    np.testing.assert_array_equal(given, before)


@pytest.mark.parametrize(
    ("given", "named", "says"),
    [
        (np.zeros((2, 3)), {}, "2x3 does not fit"),
        (np.zeros((2, 3, 16)), {}, "does not fit"),
        (np.zeros((0, 16)), {}, "no samples"),
        (np.array([["x"] * 16]), {}, "not numeric"),
        ([[1.0], [2.0, 3.0]], {}, "no array"),
        (None, {}, "none were given"),
        (None, {"wrong": np.zeros((1, 16))}, "wrong"),
        ({"input": np.zeros((1, 16)), "more": 1}, {}, "more"),
        ({"input": np.zeros((1, 16))}, {"input": np.zeros((1, 16))}, "twice"),
        (np.zeros((1, 16)), {"more": 1}, "without its name"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path: Path, given: object, named: dict[str, object], says: str) -> None:
    model = Model(make_bundle(tmp_path), target="generic-cpu")
    with pytest.raises(InputError, match=says):
        model(given, **named)


def test_a_model_that_nobody_installed_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Nothing is installed"):
        Model("other", state=tmp_path)
    release = make_bundle(tmp_path)
    install(tmp_path, release)
    with pytest.raises(InputError, match="Installed are: tiny"):
        Model("other", state=tmp_path)
    with pytest.raises(InputError, match="name the target"):
        Model(release, state=tmp_path)
    with pytest.raises(InputError, match="no model"):
        Model("../tiny", state=tmp_path)


def test_a_release_without_that_target_or_with_a_damaged_blob_is_refused(tmp_path: Path) -> None:
    release = make_bundle(tmp_path, target=("generic-cpu", "other"))
    with pytest.raises(BundleError, match="generic-cpu, other"):
        Model(release, target="third")
    with pytest.raises(BundleError, match="there is no such folder"):
        Model(tmp_path / "missing", target="generic-cpu")
    layout = Layout(release)
    blob = layout.blob_path(layout.bundle("other").files["model.onnx"].digest)
    raw = bytearray(blob.read_bytes())
    raw[-1] ^= 1
    blob.write_bytes(raw)
    with pytest.raises(BundleError, match="has digest"):
        Model(release, target="other")


def test_a_file_that_the_runtime_refuses_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="refuses the file"):
        Model(make_bundle(tmp_path, broken="file"), target="generic-cpu")


def test_the_state_folder_comes_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, make_bundle(tmp_path))
    monkeypatch.setenv("KEDGE_STATE", str(tmp_path))
    assert Model("tiny")(samples(1)).shape == (1, CLASSES)


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    model = Model(make_bundle(tmp_path), target="generic-cpu")
    model.close()
    model.close()
    with pytest.raises(InputError, match="closed"):
        model(samples(1))
    assert "closed" in repr(model)


def test_calls_are_counted_for_installed_models_only(tmp_path: Path) -> None:
    release = make_bundle(tmp_path)
    folder = install(tmp_path, release)
    unknown = Model(release, target="generic-cpu")
    unknown(samples(1))
    model = Model("tiny", state=tmp_path)
    for _ in range(5):
        model(samples(2))
    with pytest.raises(InputError):
        model(np.zeros((1, 2)))
    found = collect(folder.counters)
    assert (found.inferences, found.errors) == (5, 1)
    assert found.digests == {model.digest: 5}
    assert found.latency_ms()["p50"] > 0


def test_a_counters_folder_that_is_missing_breaks_no_call(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = install(tmp_path, make_bundle(tmp_path))
    folder.counters.rmdir()
    model = Model("tiny", state=tmp_path)
    assert model(samples(1)).shape == (1, CLASSES)
    assert "not counted" in caplog.text


def test_the_files_of_a_loaded_model_may_be_removed(tmp_path: Path) -> None:
    """Calls under way end on the old bundle also when its slot is gone."""
    slot = install(tmp_path, make_bundle(tmp_path, mebibytes=1)).current()
    assert slot is not None
    executor = Executor.of(slot.folder, slot.bundle().config)
    before = executor({"input": samples(4)})["scores"]
    for version in ("2.0", "3.0"):
        folder = install(tmp_path, make_bundle(tmp_path, version=version, seed=int(version[0])))
    folder.prune()
    assert not slot.folder.exists()
    np.testing.assert_array_equal(executor({"input": samples(4)})["scores"], before)


@pytest.mark.shared_data
def test_a_runtime_that_is_not_concurrent_serves_several_threads(tmp_path: Path, shared_data: Path) -> None:
    with np.load(shared_data / "eval" / "ic.npz") as data:
        images = data["input"][:8]
    release = make_tflite_bundle(tmp_path, shared_data / "models" / "ic_resnet8_int8.tflite", images, "ic")
    expected = _golden(release, "rpi4")
    model = Model(release, target="rpi4")
    golden.require(golden.compare(expected, {"output": model(images)}), where="test")
    alone = [model(image) for image in images]
    wrong: list[int] = []

    def work(index: int) -> None:
        for _ in range(50):
            if not np.array_equal(model(images[index]), alone[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.shared_data
def test_a_quantized_model_refuses_nan(tmp_path: Path, shared_data: Path) -> None:
    images = np.zeros((1, 32, 32, 3), dtype=np.float32)
    model = Model(
        make_tflite_bundle(tmp_path, shared_data / "models" / "ic_resnet8_int8.tflite", images, "ic"), target="rpi4"
    )
    images[0, 3, 4, 1] = np.nan
    with pytest.raises(InputError, match="NaN"):
        model(images)


def test_importing_the_package_loads_neither_numpy_nor_a_runtime() -> None:
    check = (
        "import sys, kedge_agent; kedge_agent.InputError;"
        "heavy = {'numpy', 'paho', 'onnxruntime', 'ssl'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

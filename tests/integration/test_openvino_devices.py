"""OpenVINO on other devices than the CPU: hints, a cache of what was compiled, the CPU in their place."""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.lowering import Calibration, checked_copy, classifier, executor, float_answers, images, lower

from kedge_protocol.bundle.config import (
    BundleConfig,
    GoldenRef,
    Metric,
    Provenance,
    Resources,
    Verified,
)
from kedge_protocol.errors import ConfigError, InputError, TargetError, VerificationError
from kedge_targets import registry, target
from kedge_targets.backends.openvino import library
from kedge_targets.contract import Lowered
from kedge_targets.numerics import Precision

DEVICES = {"intel-igpu": "GPU", "intel-npu": "NPU"}


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().SerializeToString())
    return checked_copy(path, tmp_path)


@pytest.fixture
def made(graph: Path, tmp_path: Path) -> Lowered:
    return lower("intel-npu", graph, Precision.INT8, Calibration("image", images(8)), tmp_path / "out")


def silent(what: str, done: int, total: int) -> None:
    pass


class CoreWith:
    """A real ``Core`` that has one device more: what is compiled for it, the CPU compiles.

    Attributes:
        asked: device and properties of each compilation.
        fails: for that device.
    """

    def __init__(self, device: str, *, fails: str = "") -> None:
        self._core = library.load().Core()
        self._device = device
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    @property
    def available_devices(self) -> list[str]:
        return [*self._core.available_devices, self._device]

    def get_property(self, device: str, name: str) -> Any:
        return self._core.get_property("CPU", name)

    def read_model(self, path: str) -> Any:
        return self._core.read_model(path)

    def compile_model(self, model: Any, device: str, settings: dict[str, Any]) -> Any:
        self.asked.append((device, settings))
        if device != "CPU" and self.fails:
            raise RuntimeError(self.fails)
        hints = {name: value for name, value in settings.items() if name != "INFERENCE_PRECISION_HINT"}
        return self._core.compile_model(model, "CPU", {**hints, "INFERENCE_PRECISION_HINT": "f32"})


def with_core(monkeypatch: pytest.MonkeyPatch, core: CoreWith) -> None:
    monkeypatch.setattr(library.load(), "Core", lambda: core)


@pytest.mark.parametrize("name", DEVICES)
def test_files_for_a_device_have_fixed_shapes_and_are_proved_on_the_cpu_only(
    graph: Path, tmp_path: Path, name: str
) -> None:
    made = lower(name, graph, Precision.INT8, Calibration("image", images(8)), tmp_path / "out")
    assert made.verified is Verified.CHECKED
    assert registry.compiler("openvino").verification(target.find(name)) is Verified.CHECKED
    assert registry.compiler("openvino").verification(target.find("intel-cpu")) is Verified.EXECUTED
    assert made.inputs[0].shape[0] is None
    assert made.inputs[0].file.shape == (1, 3, 8, 8)
    assert made.runtime_options == {"device": DEVICES[name], "precision": "f16"}
    samples = images(5, seed=3)
    answers = executor(name, made)({"image": samples})["score"]
    expected = float_answers(graph, samples)
    assert np.abs(answers - expected).max() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("name", DEVICES)
def test_without_the_device_the_cpu_runs_it_and_says_so(
    made: Lowered, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    device = DEVICES[name]
    if device in library.load().Core().available_devices:
        pytest.skip(f"there is a {device} here")
    with caplog.at_level(logging.WARNING):
        session = registry.runtime("openvino").load(made.files["model.xml"], {"device": device, "precision": "f16"})
    assert f"the CPU, not the {device}" in session.detail
    assert f"sees no {device}" in session.detail
    assert f"not on the {device}" in caplog.text


def test_the_device_gets_its_hints(made: Lowered, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    core = CoreWith("NPU")
    with_core(monkeypatch, core)
    options = {**made.runtime_options, "threads": 1, "cache_dir": str(tmp_path / "kept")}
    session = registry.runtime("openvino").load(made.files["model.xml"], options)
    assert core.asked == [
        (
            "NPU",
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "f16",
                "INFERENCE_NUM_THREADS": 1,
                "CACHE_DIR": str(tmp_path / "kept"),
            },
        )
    ]
    assert session.detail.startswith("NPU")
    assert session.run([images(1)])[0].shape == (1, 4)


def test_a_device_that_does_not_compile_the_model_leaves_it_to_the_cpu(
    made: Lowered, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    core = CoreWith("NPU", fails="[NOT_IMPLEMENTED] no such operation")
    with_core(monkeypatch, core)
    with caplog.at_level(logging.WARNING):
        session = registry.runtime("openvino").load(made.files["model.xml"], made.runtime_options)
    assert [device for device, _ in core.asked] == ["NPU", "CPU"]
    assert core.asked[1][1]["INFERENCE_PRECISION_HINT"] == "f32"
    assert "no such operation" in session.detail
    assert "no such operation" in caplog.text


def test_a_damaged_file_is_refused_wherever_it_should_run(made: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    made.files["model.xml"].write_bytes(made.files["model.xml"].read_bytes()[:300])
    with_core(monkeypatch, CoreWith("NPU"))
    with pytest.raises(VerificationError, match=r"model\.xml"):
        registry.runtime("openvino").load(made.files["model.xml"], made.runtime_options)


def test_with_a_kernel_set_the_device_is_left_alone(made: Lowered, monkeypatch: pytest.MonkeyPatch) -> None:
    core = CoreWith("NPU")
    with_core(monkeypatch, core)
    runtime = registry.runtime("openvino")
    answers = []
    for name in runtime.kernel_sets_for(made.runtime_options):
        session = runtime.load(made.files["model.xml"], made.runtime_options, kernel_set=name)
        answers.append(session.run([images(1)])[0])
        assert session.detail == ""
    assert {device for device, _ in core.asked} == {"CPU"}
    assert not np.array_equal(answers[1], answers[2]), "rounding to FP16 changes something"
    np.testing.assert_allclose(answers[1], answers[2], rtol=0.05, atol=0.05)


def test_a_cpu_is_not_asked_for_half_precision(made: Lowered) -> None:
    runtime = registry.runtime("openvino")
    assert "half" in runtime.kernel_sets_for({"device": "GPU"})
    assert "half" not in runtime.kernel_sets_for({"device": "CPU"})
    assert set(runtime.kernel_sets_for({})) < set(runtime.kernel_sets)


def configuration(golden: str, **options: Any) -> BundleConfig:
    """Of a bundle; only what the cache looks at is real."""
    return BundleConfig(
        schema_version=1, name="shapes", version="1.0", target="intel-npu", backend="openvino", entry="model.xml",
        precision="int8", runtimes=(), inputs=(), outputs=(), runtime_options=options, verified=Verified.CHECKED,
        metric=Metric(name="top1", value=1.0, reference=1.0, samples=1, measured_on=""),
        resources=Resources(storage_bytes=0, memory_bytes=0),
        provenance=Provenance(
            model_digest="", evaluation_digest="", calibration_samples=0, evaluation_samples=0, tools={}
        ),
        golden=GoldenRef(file="golden.npz", digest=f"sha256:{golden * 64}", samples=1, kernel_sets=()),
    )  # fmt: skip


def test_what_was_compiled_is_kept_and_taken_the_next_time(made: Lowered, tmp_path: Path) -> None:
    """With the CPU as the device, whose plugin keeps compiled models too."""
    runtime = registry.runtime("openvino")
    options = {"device": "CPU", "cache": True}
    config = configuration("a", **options)
    prepared = runtime.prepare(tmp_path, config, cache=tmp_path / "cache", progress=silent)
    folder = Path(prepared["cache_dir"])
    assert tmp_path / "cache" in folder.parents
    entry, loaded = made.files["model.xml"], {**options, **prepared}
    first = runtime.load(entry, loaded)
    (blob,) = folder.glob("*.blob")
    written = blob.stat().st_mtime_ns
    second = runtime.load(entry, loaded)
    assert blob.stat().st_mtime_ns == written
    sample = images(1)
    expected = first.run([sample])[0]
    np.testing.assert_array_equal(second.run([sample])[0], expected)
    # Damaged, it is compiled anew.
    raw = blob.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", bytes(len(raw))):
        blob.write_bytes(damaged)
        np.testing.assert_array_equal(runtime.load(entry, loaded).run([sample])[0], expected)


def test_two_versions_are_kept_and_older_ones_go(tmp_path: Path) -> None:
    runtime = registry.runtime("openvino")
    folders = []
    for number, golden in enumerate("abc"):
        config = configuration(golden, device="NPU")
        prepared = runtime.prepare(tmp_path, config, cache=tmp_path / "cache", progress=silent)
        folders.append(Path(prepared["cache_dir"]))
        os.utime(folders[-1], (number, number))
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_a_cache_that_cannot_be_made_costs_time_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        config = configuration("a", device="NPU")
        assert registry.runtime("openvino").prepare(tmp_path, config, cache=tmp_path / "cache", progress=silent) == {}
    assert "cannot be kept" in caplog.text


def test_nothing_is_kept_for_a_cpu_unless_it_is_asked_for(tmp_path: Path) -> None:
    runtime = registry.runtime("openvino")
    for config in (configuration("a"), configuration("a", device="NPU", cache=False)):
        assert runtime.prepare(tmp_path, config, cache=tmp_path / "cache", progress=silent) == {}
    assert not (tmp_path / "cache").exists()


def test_streams_answer_several_threads_at_once(made: Lowered) -> None:
    session = registry.runtime("openvino").load(made.files["model.xml"], {"device": "CPU", "streams": 2})
    assert session.concurrent
    samples = [images(1, seed=seed) for seed in range(8)]
    expected = [session.run([sample])[0] for sample in samples]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for turn in range(40):
            index = (turn + offset) % len(samples)
            if not np.array_equal(session.run([samples[index]])[0], expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    session.close()
    with pytest.raises(InputError, match="closed"):
        session.run([samples[0]])


@pytest.mark.parametrize("wrong", [{"device": "TPU"}, {"streams": -1}, {"streams": True}, {"cache": 1}])
def test_options_that_are_none(made: Lowered, graph: Path, tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        registry.runtime("openvino").load(made.files["model.xml"], wrong)
    device = target.find("intel-cpu")
    board = replace(device, backends=(replace(device.backends[0], options=wrong),))
    with pytest.raises(TargetError, match=next(iter(wrong))):
        lower(board.name, graph, Precision.FLOAT32, Calibration("image", images(1)), tmp_path / "out", **wrong)

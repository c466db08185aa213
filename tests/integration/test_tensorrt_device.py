"""The device half of TensorRT against a faithful fake of its three versions: building, keeping, choosing, running."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support import nvidia
from tests.support.nvidia import VERSIONS, Device

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import InputError
from kedge_targets.backends.tensorrt import runtime as backend
from kedge_targets.executor import Executor

BOTH = ["build int8", "deserialize int8", "build fp16", "deserialize fp16"]


one_version = pytest.mark.parametrize(
    "gpu",
    ["10.3", *(pytest.param(one, marks=pytest.mark.campaign) for one in VERSIONS if one != "10.3")],
    indirect=True,
)
"""For what is the same code whichever version it is."""


@pytest.fixture(params=list(VERSIONS))
def gpu(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """A device with each version of TensorRT in turn."""
    made = nvidia.device(tmp_path, monkeypatch, request.param)
    yield made
    made.remove()


@pytest.fixture
def bundle(tmp_path: Path) -> tuple[Path, BundleConfig]:
    """A bundle with both graphs and a fixed batch, unpacked."""
    return nvidia.unpacked(nvidia.release(tmp_path / "made"), tmp_path / "slot")


def opened(bundle: tuple[Path, BundleConfig], gpu: Device) -> Executor:
    return Executor.of(*bundle, cache=gpu.cache)


def right(executor: Executor, bundle: tuple[Path, BundleConfig]) -> bool:
    """Whether it answers golden vectors' inputs about as the float network would."""
    raw = nvidia.samples(8)
    found = np.concatenate([executor({"input": raw[i : i + 1]})["scores"] for i in range(8)])
    random = np.random.default_rng(0)
    weight, bias = random.normal(size=(16, 4)), random.normal(size=4)
    return bool(np.abs(found - (raw @ weight + bias)).max() < 0.1)


def test_both_precisions_are_built_once_and_one_is_run(gpu: Device, bundle: tuple[Path, BundleConfig]) -> None:
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    assert gpu.did()[:4] == BOTH
    assert "TensorRT" in executor.detail
    assert "on Orin (compute capability 8.7)" in executor.detail
    assert "CUDA graph" in executor.detail
    assert "fell back" not in executor.detail
    executor.close()
    with pytest.raises(InputError):
        executor({"input": nvidia.samples(1)})


@one_version
def test_a_second_start_finds_everything(gpu: Device, bundle: tuple[Path, BundleConfig]) -> None:
    opened(bundle, gpu).close()
    gpu.did()
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    [line] = gpu.did()
    assert line.startswith("deserialize")


@one_version
@pytest.mark.parametrize(("slow", "taken"), [("int8", "fp16"), ("fp16", "int8")])
def test_the_faster_is_kept(
    gpu: Device, bundle: tuple[Path, BundleConfig], monkeypatch: pytest.MonkeyPatch, slow: str, taken: str
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_SLOW", slow)
    executor = opened(bundle, gpu)
    executor.close()
    assert gpu.did()[-1] == f"deserialize {taken}"
    assert f", {taken} (int8 " in executor.detail


@one_version
def test_the_faster_is_not_taken_where_its_golden_vectors_do_not_hold(
    gpu: Device, bundle: tuple[Path, BundleConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_SLOW", "fp16")
    monkeypatch.setenv("FAKE_TENSORRT_WRONG", "int8")
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    assert gpu.did()[-1] == "deserialize fp16"
    assert "int8: golden vectors do not hold" in executor.detail


@one_version
def test_a_damaged_engine_is_built_anew_and_never_deserialized(gpu: Device, bundle: tuple[Path, BundleConfig]) -> None:
    opened(bundle, gpu).close()
    gpu.did()
    assert len(gpu.engines()) == 2
    for path in gpu.engines():
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    did = gpu.did()
    assert did[0].startswith("build")
    assert "foreign engine" not in did


@one_version
def test_an_engine_of_another_device_is_never_deserialized(
    gpu: Device, bundle: tuple[Path, BundleConfig], tmp_path: Path
) -> None:
    opened(bundle, gpu).close()
    others = {path.name: path.read_bytes() for path in gpu.engines()}
    gpu.cache = tmp_path / "another"
    opened(bundle, gpu).close()
    for name, raw in others.items():
        (gpu.cache / "tensorrt" / name).write_bytes(raw)
    gpu.did()
    opened(bundle, gpu).close()
    assert gpu.did()[0].startswith("build")


@one_version
@pytest.mark.parametrize("change", ["version", "capability", "gpu", "graph", "mode"])
def test_what_an_engine_depends_on_makes_another_engine(
    gpu: Device, bundle: tuple[Path, BundleConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    opened(bundle, gpu).close()
    gpu.did()
    if change == "version":
        gpu.install("11" if "v10_3" in str(__import__("tensorrt").__file__) else "10.3")
    elif change == "capability":
        monkeypatch.setenv("FAKE_GPU_CAPABILITY", "11.0")
    elif change == "gpu":
        monkeypatch.setenv("FAKE_GPU", "Thor")
    elif change == "graph":
        bundle = nvidia.unpacked(nvidia.release(tmp_path / "other", seed=1), tmp_path / "slot2")
    else:
        monkeypatch.setattr("kedge_targets.jetson.power_mode", lambda: "15W")
    opened(bundle, gpu).close()
    assert gpu.did()[:4] == BOTH


@one_version
@pytest.mark.parametrize("how", ["refuse", "no_memory", "crash"])
def test_one_precision_that_cannot_be_built_leaves_the_other(
    gpu: Device, bundle: tuple[Path, BundleConfig], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", f"int8:{how}")
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    told = {"refuse": "Could not find any implementation", "no_memory": "out of memory", "crash": "SIGSEGV"}[how]
    assert told in executor.detail
    assert ", fp16 (" in executor.detail
    assert gpu.did()[-1] == "deserialize fp16"


@one_version
def test_a_build_that_hangs_is_ended_and_not_tried_again(
    gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = nvidia.unpacked(
        nvidia.release(tmp_path / "made", only="fp16", options={"build_seconds": 6.0}), tmp_path / "slot"
    )
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", "fp16:hang")
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    assert executor.detail.startswith("fell back to ONNX Runtime")
    assert "deadline of 6 s" in executor.detail
    executor.close()
    assert gpu.did() == ["build fp16"]
    executor = opened(bundle, gpu)
    assert "deadline of 6 s" in executor.detail
    executor.close()
    assert gpu.did() == []
    # With another start of the device there may be more time.
    monkeypatch.delenv("FAKE_TENSORRT_BUILD")
    monkeypatch.setattr("kedge_targets.backends.tensorrt.device.boot_id", lambda: "another start")
    executor = opened(bundle, gpu)
    assert "fell back" not in executor.detail
    executor.close()


@one_version
def test_a_build_that_eats_the_memory_is_ended(gpu: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = nvidia.unpacked(
        nvidia.release(tmp_path / "made", only="fp16", options={"build_mib": 400.0}), tmp_path / "slot"
    )
    monkeypatch.setenv("FAKE_TENSORRT_BUILD", "fp16:eat")
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    assert "400 MiB are allowed" in executor.detail
    assert gpu.did() == ["build fp16"]


def test_a_node_that_the_parser_refuses_is_named(gpu: Device, tmp_path: Path) -> None:
    bundle = nvidia.unpacked(nvidia.release(tmp_path / "made", only="int8", asymmetric=True), tmp_path / "slot")
    executor = opened(bundle, gpu)
    executor.close()
    assert executor.detail.startswith("fell back to ONNX Runtime")
    assert "only int8 with zero-point 0" in executor.detail
    assert "quantize_input" in executor.detail or "node 0" in executor.detail


def test_a_free_batch_has_a_profile_and_no_graph(gpu: Device, tmp_path: Path) -> None:
    bundle = nvidia.unpacked(nvidia.release(tmp_path / "made", batch=None), tmp_path / "slot")
    executor = opened(bundle, gpu)
    assert "fell back" not in executor.detail
    assert "CUDA graph" not in executor.detail
    raw = nvidia.samples(19)
    whole = executor({"input": raw})["scores"]
    single = np.concatenate([executor({"input": raw[i : i + 1]})["scores"] for i in range(19)])
    np.testing.assert_allclose(whole, single, atol=1e-3)
    executor.close()


def test_arrays_that_do_not_fit_are_the_callers_error(gpu: Device, bundle: tuple[Path, BundleConfig]) -> None:
    session = backend.Runtime().load(bundle[0] / "recipe.json", {}, kernel_set="fp16")
    with pytest.raises(InputError, match="shape"):
        session.run([nvidia.samples(3)])
    with pytest.raises(InputError, match="complex"):
        session.run([nvidia.samples(1).astype(np.complex64)])
    first = session.run([nvidia.samples(1)])[0]
    kept = first.copy()
    session.run([nvidia.samples(1, seed=9)])
    np.testing.assert_array_equal(first, kept, "what comes back is the caller's own")
    session.close()


def test_all_memory_of_the_gpu_is_given_back(gpu: Device, bundle: tuple[Path, BundleConfig]) -> None:
    for _ in range(2):
        opened(bundle, gpu).close()
    import fake_gpu  # the fake device's own module, on the path only here

    assert fake_gpu.GPU.blocks == {}
    assert fake_gpu.GPU.streams == {}
    assert fake_gpu.GPU.graphs == {}


def test_too_little_memory_for_the_tensors_falls_back(
    gpu: Device, bundle: tuple[Path, BundleConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GPU_BYTES", "70")
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    assert executor.detail.startswith("fell back to ONNX Runtime")
    assert "cudaErrorMemoryAllocation" in executor.detail


def test_a_device_without_a_gpu_falls_back_and_says_so(
    gpu: Device, bundle: tuple[Path, BundleConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GPU", "")
    executor = opened(bundle, gpu)
    assert right(executor, bundle)
    executor.close()
    assert "on the CPU, int8: no GPU can be used" in executor.detail
    assert gpu.did() == []

"""An agent on a device with TensorRT: engines are built before the proof, and status says what really runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import nvidia
from tests.support.installed import install
from tests.support.nvidia import Device

from kedge_agent.model import Model
from kedge_agent.proving import ProofLimits, prove
from kedge_agent.serving.bundle_watch import ServingWatch
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.slots import ModelFolder
from kedge_agent.status import read_status
from kedge_protocol.errors import VerificationError


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = nvidia.device(tmp_path, monkeypatch, "10.3")
    made.cache = tmp_path / "state" / "cache"
    yield made
    made.remove()


@pytest.fixture
def installed(tmp_path: Path) -> ModelFolder:
    return install(tmp_path / "state", nvidia.release(tmp_path / "made"))


def proved(folder: ModelFolder, told: list[str], limits: ProofLimits | None = None) -> str | None:
    slot = folder.current()
    assert slot is not None
    return prove(slot.folder, slot.bundle().config, limits or ProofLimits(), folder.cache, told.append).detail


def test_the_proof_builds_and_the_application_finds_the_engines(gpu: Device, installed: ModelFolder) -> None:
    told: list[str] = []
    detail = proved(installed, told)
    assert detail is not None
    assert detail.startswith("TensorRT 10.3.0 on Orin")
    assert any("int8: Building Engine, 2 of 2" in line for line in told)
    assert len(gpu.engines()) == 2
    gpu.did()
    with Model("small", state=gpu.cache.parent) as model:
        assert model(nvidia.samples(1)).shape == (1, 4)
        assert model.detail == detail
    assert [line.split()[0] for line in gpu.did()] == ["deserialize"]


def test_the_serving_process_reports_what_it_runs(gpu: Device, installed: ModelFolder) -> None:
    state = gpu.cache.parent
    models = ServedModels(state)
    models.scan()
    [said] = ServingWatch(state, lambda name: ModelFolder(state, name).serving()).look()
    assert said.error is None
    assert said.detail is not None
    assert said.detail.startswith("TensorRT 10.3.0 on Orin")
    assert said.detail in read_status(state)


def test_a_device_that_fell_back_says_so_everywhere(
    gpu: Device, installed: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_GPU", "")
    state = gpu.cache.parent
    detail = proved(installed, [])
    assert detail is not None
    assert detail.startswith("fell back to ONNX Runtime")
    ServedModels(state).scan()
    [said] = ServingWatch(state, lambda name: ModelFolder(state, name).serving()).look()
    assert said.detail == detail
    assert "fell back to ONNX Runtime" in read_status(state)
    with Model("small", state=state) as model:
        assert "on the CPU" in model.detail


def test_a_device_without_tensorrt_falls_back(gpu: Device, installed: ModelFolder) -> None:
    gpu.remove()
    gpu.patch.setenv("PYTHONPATH", "")
    with Model("small", state=gpu.cache.parent) as model:
        assert model(nvidia.samples(1)).shape == (1, 4)
        assert "TensorRT cannot be loaded" in model.detail


def test_both_precisions_wrong_is_refused_only_where_the_fallback_is_wrong_too(
    gpu: Device, installed: ModelFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = installed.current()
    assert slot is not None
    damaged = slot.folder / "model_int8_qdq.onnx"
    other = nvidia.graphs(batch=1, seed=3)
    damaged.unlink()
    damaged.write_bytes(other["int8"])
    fp16 = slot.folder / "model_fp16.onnx"
    fp16.unlink()
    fp16.write_bytes(other["fp16"])
    with pytest.raises(VerificationError, match="golden vectors do not hold"):
        proved(installed, [])

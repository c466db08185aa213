"""The real thing, end to end, where an NVIDIA GPU, TensorRT and cuda-python are: engines are built, measured and run.

The figures that it finds are printed and recorded as properties of the test (``pytest --junit-xml``).
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from tests.support import nvidia

from kedge_targets.backends.tensorrt import device
from kedge_targets.executor import Executor


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, None], ids=["static", "free batch"])
def test_engines_are_built_measured_and_run(
    batch: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record_property: pytest.FixtureRequest
) -> None:
    nvidia.device(tmp_path, monkeypatch, None)
    if (reason := device.missing()) is not None:
        pytest.skip(f"no GPU with TensorRT here: {reason}")
    folder, config = nvidia.unpacked(nvidia.release(tmp_path / "made", batch=batch), tmp_path / "slot")
    began = time.perf_counter()
    executor = Executor.of(folder, config, cache=tmp_path / "cache")
    built = time.perf_counter() - began
    try:
        assert "fell back" not in executor.detail
        assert ("CUDA graph" in executor.detail) == (batch == 1)
        raw = nvidia.samples(8)
        found = np.concatenate([executor({"input": raw[i : i + 1]})["scores"] for i in range(8)])
        random = np.random.default_rng(0)
        weight, bias = random.normal(size=(16, 4)), random.normal(size=4)
        assert np.abs(found - (raw @ weight + bias)).max() < 0.1
        calls = []
        for _ in range(200):
            at = time.perf_counter()
            executor({"input": raw[:1]})
            calls.append(time.perf_counter() - at)
    finally:
        executor.close()
    began = time.perf_counter()
    again = Executor.of(folder, config, cache=tmp_path / "cache")
    loaded = time.perf_counter() - began
    again.close()
    assert loaded < built, "the second start finds the engines"
    figures = {"detail": executor.detail, "built_s": round(built, 2), "loaded_s": round(loaded, 2)}
    figures["call_ms_p50"] = round(float(np.median(calls)) * 1000, 4)
    for name, value in figures.items():
        record_property(name, value)  # type: ignore[operator]  # pytest gives a function
        print(f"{name}: {value}")

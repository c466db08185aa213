"""The worker's task that runs a bundle's golden vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support import bundles

from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import DigestMismatchError, VerificationError
from kedge_targets.proof import PROVE, ProveAnswer, ProveRequest
from kedge_targets.worker import Worker

pytestmark = pytest.mark.device


def unpacked(release: Path, folder: Path, target: str = "generic-cpu") -> ProveRequest:
    """A bundle's files by title in ``folder``, as in a device's slot."""
    layout = Layout(release)
    bundle = layout.bundle(target)
    folder.mkdir()
    for title, descriptor in bundle.files.items():
        (folder / title).write_bytes(layout.read(descriptor))
    (folder / "config.json").write_bytes(bundle.config_raw)
    return ProveRequest(folder=str(folder), config=str(folder / "config.json"))


def prove(request: ProveRequest, logs: Path) -> ProveAnswer:
    with Worker(name="prove", log_dir=logs) as worker:
        return worker.call(PROVE, request, ProveAnswer, deadline=120)


@pytest.mark.parametrize("batch", [None, 2])
def test_a_healthy_bundle_holds(tmp_path: Path, batch: int | None) -> None:
    steps: list[tuple[str, int, int]] = []
    request = unpacked(bundles.make_bundle(tmp_path, double=True, batch=batch), tmp_path / "slot")
    with Worker(name="prove", log_dir=tmp_path) as worker:
        answer = worker.call(PROVE, request, ProveAnswer, deadline=120, on_progress=lambda *step: steps.append(step))
    assert answer.holds
    assert answer.reason == ""
    assert answer.samples == 8
    assert {deviation.output for deviation in answer.deviations} == {"scores", "hidden"}
    assert all(0 <= deviation.max_abs <= deviation.allowed_max_abs for deviation in answer.deviations)
    assert answer.runtime_version
    assert 0 < answer.seconds_p50 < 10
    assert 10e6 < answer.peak_memory_bytes < 4e9
    assert steps[-1] == ("golden vectors", 8, 8)


@pytest.mark.parametrize("broken", ["golden", "weights"])
def test_vectors_that_do_not_hold_are_an_answer_with_a_reason(tmp_path: Path, broken: str) -> None:
    answer = prove(unpacked(bundles.make_bundle(tmp_path, broken=broken), tmp_path / "slot"), tmp_path)
    assert not answer.holds
    assert "golden vectors do not hold: output 'scores' deviates" in answer.reason
    (deviation,) = answer.deviations
    assert deviation.rms > deviation.allowed_rms


def test_a_file_that_the_runtime_refuses_is_an_error_with_its_reason(tmp_path: Path) -> None:
    request = unpacked(bundles.make_bundle(tmp_path, broken="file"), tmp_path / "slot")
    with pytest.raises(VerificationError, match="refuses the file"):
        prove(request, tmp_path)


def test_vectors_that_are_not_the_bundles_are_not_run(tmp_path: Path) -> None:
    request = unpacked(bundles.make_bundle(tmp_path), tmp_path / "slot")
    vectors = Path(request.folder) / "golden.npz"
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"x")
    with pytest.raises(DigestMismatchError):
        prove(request, tmp_path)


@pytest.mark.shared_data
@pytest.mark.parametrize("kernel_set", ["xnnpack", "builtin"])
def test_a_healthy_int8_file_holds_with_each_kernel_set(tmp_path: Path, shared_data: Path, kernel_set: str) -> None:
    with np.load(shared_data / "eval" / "ic.npz") as arrays:
        samples = arrays["input"][:8]
    release = bundles.make_tflite_bundle(tmp_path, shared_data / "models" / "ic_resnet8_int8.tflite", samples)
    request = replace(unpacked(release, tmp_path / "slot", "rpi4"), kernel_set=kernel_set)
    answer = prove(request, tmp_path)
    assert answer.holds, answer.reason
    assert answer.runtime == "ai-edge-litert"

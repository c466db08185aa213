"""Real networks through the onnxruntime backend: accuracy, size, and the same answers without VNNI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support import other_processor
from tests.support.lowering import Calibration, Case, checked_copy, executor, float_answers, ic, kws, lower, size, top1

from kedge_targets import registry
from kedge_targets.graph import library
from kedge_targets.numerics import Granularity, Plan, Precision, QuantizationScheme

pytestmark = pytest.mark.shared_data

TARGET = "generic-cpu"


@dataclass(frozen=True)
class Bound:
    """What the packed file must keep."""

    case: Callable[[Path], Case]
    drop: float
    agreement: float
    size: float


BOUNDS = {"ic": Bound(ic, 0.007, 0.95, 0.32), "kws": Bound(kws, 0.003, 0.95, 0.52)}


@pytest.mark.parametrize("name", BOUNDS)
def test_int8_keeps_the_answers_and_is_small(shared_data: Path, tmp_path: Path, name: str) -> None:
    bound = BOUNDS[name]
    case = bound.case(shared_data)
    graph = checked_copy(case.model, tmp_path)
    calibration = Calibration("input", case.calibration)
    lowered = lower(TARGET, graph, Precision.INT8, calibration, tmp_path / "out")
    assert lowered.calibration_samples == len(case.calibration)
    expected = float_answers(case.model, case.evaluation)
    for kernel_set in registry.runtime("onnxruntime").kernel_sets:
        actual = executor(TARGET, lowered, kernel_set)({"input": case.evaluation})["output"]
        assert top1(actual, case.labels) >= top1(expected, case.labels) - bound.drop
        # The reference kernels stand for other libraries and processors, so they get a little more room.
        allowed = bound.agreement - (0.02 if kernel_set != "fused" else 0)
        assert (actual.argmax(1) == expected.argmax(1)).mean() >= allowed
    assert size(lowered) <= bound.size * case.model.stat().st_size


@pytest.mark.parametrize("precision", [Precision.FLOAT16, Precision.FLOAT32])
@pytest.mark.parametrize("name", BOUNDS)
def test_float_precisions_keep_every_answer(shared_data: Path, tmp_path: Path, name: str, precision: Precision) -> None:
    case = BOUNDS[name].case(shared_data)
    lowered = lower(
        TARGET, checked_copy(case.model, tmp_path), precision, Calibration("input", case.calibration), tmp_path / "o"
    )
    expected = float_answers(case.model, case.evaluation)
    actual = executor(TARGET, lowered)({"input": case.evaluation})["output"]
    assert (actual.argmax(1) == expected.argmax(1)).mean() >= 0.998
    np.testing.assert_allclose(actual, expected, atol=0.02 if precision is Precision.FLOAT16 else 1e-5)


FULL_RANGE = QuantizationScheme(
    activation="uint8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_CHANNEL
)


@pytest.mark.needs(other_processor.QEMU)
def test_without_vnni_the_answers_are_the_same(shared_data: Path, tmp_path: Path) -> None:
    """The file for unknown processors is equal bit for bit on an emulated Haswell and here, and does there what its
    numbers say. With weights of 8 bits a processor without VNNI saturates, so this test can fail."""
    samples, entries = [], []
    for name, case in (("ic", ic(shared_data)), ("kws", kws(shared_data))):
        folder = tmp_path / name
        folder.mkdir()
        graph = checked_copy(case.model, folder)
        for way in (None, FULL_RANGE):
            plan = Plan(default=Precision.INT8, scheme=way)
            calibration = Calibration("input", case.calibration)
            lowered = lower(TARGET, graph, plan, calibration, folder / ("full" if way else "chosen"))
            entries.append(lowered.files[lowered.entry])
            samples.append(case.evaluation[:20])
    pairs = list(zip(entries, samples, strict=True))
    there = other_processor.on_haswell("onnxruntime", pairs, tmp_path)
    for chosen in (0, 2):
        np.testing.assert_array_equal(other_processor.answers("onnxruntime", *pairs[chosen]), there[chosen])
    ic_chosen, ic_full, kws_chosen, kws_full = (
        float(np.abs(theirs - in_float(*pair)).mean()) for pair, theirs in zip(pairs, there, strict=True)
    )
    assert ic_chosen < 0.001 < 0.003 < ic_full
    assert kws_chosen < 0.001 < 0.03 < kws_full


def in_float(entry: Path, samples: other_processor.Samples) -> other_processor.Samples:
    """What the graph's QuantizeLinear and DequantizeLinear say, computed in float: nothing saturates in between."""
    onnxruntime = library.load()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(entry), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: sample[None]})[0] for sample in samples])

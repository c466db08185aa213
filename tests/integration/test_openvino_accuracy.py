"""Real networks through the openvino backend: accuracy, size, and the same answers without VNNI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from tests.support import other_processor
from tests.support.lowering import Calibration, Case, checked_copy, executor, float_answers, ic, kws, lower, top1

from kedge_targets import registry
from kedge_targets.backends.openvino import library
from kedge_targets.numerics import Granularity, Plan, Precision, QuantizationScheme

pytestmark = pytest.mark.shared_data

TARGET = "intel-cpu"


@dataclass(frozen=True)
class Bound:
    """What the packed files must keep; sizes of ``.bin`` and of both files, relative to the float model."""

    case: Callable[[Path], Case]
    drop: float
    agreement: float
    weights: float
    both: float


BOUNDS = {"ic": Bound(ic, 0.007, 0.95, 0.45, 0.45), "kws": Bound(kws, 0.003, 0.95, 0.45, 0.90)}


@pytest.mark.parametrize("name", BOUNDS)
def test_int8_keeps_the_answers_and_is_small(
    shared_data: Path, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    bound = BOUNDS[name]
    case = bound.case(shared_data)
    graph = checked_copy(case.model, tmp_path)
    lowered = lower(TARGET, graph, Precision.INT8, Calibration("input", case.calibration), tmp_path / "out")
    assert lowered.calibration_samples == len(case.calibration)
    expected = float_answers(case.model, case.evaluation)
    for kernel_set in registry.runtime("openvino").kernel_sets:
        actual = executor(TARGET, lowered, kernel_set)({"input": case.evaluation})["output"]
        assert top1(actual, case.labels) >= top1(expected, case.labels) - bound.drop
        allowed = bound.agreement - (0.02 if kernel_set != "fused" else 0)
        assert (actual.argmax(1) == expected.argmax(1)).mean() >= allowed
    sizes = {title: path.stat().st_size for title, path in lowered.files.items()}
    record_property("sizes", sizes)
    assert sizes["model.bin"] <= bound.weights * case.model.stat().st_size
    assert sum(sizes.values()) <= bound.both * case.model.stat().st_size


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
    """With weights of 7 bits an emulated Haswell answers as this processor, and as the file's numbers say; with 8 bits
    it saturates, so this test can fail."""
    case = ic(shared_data)
    graph = checked_copy(case.model, tmp_path)
    calibration = Calibration("input", case.calibration)
    chosen = lower(TARGET, graph, Precision.INT8, calibration, tmp_path / "chosen")
    full = lower(TARGET, graph, Plan(default=Precision.INT8, scheme=FULL_RANGE), calibration, tmp_path / "full")
    samples = case.evaluation[:20]
    models = [(lowered.files[lowered.entry], samples) for lowered in (chosen, full)]
    there = other_processor.on_haswell("openvino", models, tmp_path)
    np.testing.assert_array_equal(other_processor.answers("openvino", *models[0]), there[0])
    as_chosen, as_full = (
        float(np.abs(theirs - in_float(*model)).mean()) for model, theirs in zip(models, there, strict=True)
    )
    assert as_chosen < 0.01 < 0.03 < as_full


def in_float(entry: Path, samples: other_processor.Samples) -> other_processor.Samples:
    """What the file's FakeQuantize layers say, computed in float: nothing saturates in between."""
    settings = {"LP_TRANSFORMS_MODE": "NO", "INFERENCE_PRECISION_HINT": "f32"}
    model = library.load().Core().compile_model(str(entry), "CPU", settings)
    return np.concatenate([model([sample[None]])[0] for sample in samples])

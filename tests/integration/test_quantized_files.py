"""Files that ONNX Runtime's quantizer wrote, on each target: kept, or taken by their scales."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
from tests.support.lowering import checked_copy, executor, lower
from tests.support.quantized_files import FORMS, NETWORKS, Form, Samples, written

from kedge_targets.backends.onnxruntime.compiler import Compiler
from kedge_targets.contract import Lowered
from kedge_targets.graph.rounding import sqnr_db
from kedge_targets.numerics import Precision
from kedge_targets.true_precision import true_name

HEALTHY = 20.0

_STATIC, _DYNAMIC, _PAIRS = Form("operators", weight="uint8"), Form("dynamic", weight="uint8"), Form("pairs", "int8")
"""One of each kind; weights and activations that do not saturate in ONNX Runtime on any processor."""
_ALL = [(network, form) for network in NETWORKS for form in FORMS]


def taken(
    network: str, form: Form, target: str, folder: Path, precision: Precision = Precision.INT8
) -> tuple[float, Lowered]:
    """Return the dB of the lowered file, on three samples at once, against the file before it was quantized, and the
    lowered file."""
    _, shapes = written(network, form, folder)
    path = checked_copy(folder / "quantized.onnx", folder)
    lowered = lower(target, path, precision, Samples(shapes, 64), folder / "out")
    feed = Samples(shapes, 3, seed=9).arrays
    expected = onnxruntime.InferenceSession(str(folder / "float.onnx")).run(["y"], feed)[0]
    return sqnr_db(expected, executor(target, lowered)(feed)["y"]), lowered


@pytest.mark.parametrize(
    ("network", "form"),
    [
        pytest.param(network, form, marks=() if form in (_STATIC, _DYNAMIC, _PAIRS) else pytest.mark.campaign)
        for network, form in _ALL
    ],
    ids=str,
)
def test_quantized_files_are_taken_on_an_intel_cpu(network: str, form: Form, tmp_path: Path) -> None:
    decibels, lowered = taken(network, form, "intel-cpu", tmp_path)
    assert decibels > HEALTHY
    assert any("quantized already" in note for note in lowered.notes)


_ON_A_PI = [("pictures", _STATIC), ("vectors", _DYNAMIC)]


@pytest.mark.usefixtures("tflite_toolchain")
@pytest.mark.parametrize(
    ("network", "form"),
    [pytest.param(*one, marks=() if one in _ON_A_PI else pytest.mark.campaign) for one in _ALL],
    ids=str,
)
def test_quantized_files_are_taken_on_a_raspberry_pi(network: str, form: Form, tmp_path: Path) -> None:
    decibels, lowered = taken(network, form, "rpi4", tmp_path)
    assert decibels > HEALTHY
    assert any("quantized already" in note for note in lowered.notes)


@pytest.mark.parametrize(("form", "name"), [(_STATIC, "int8"), (_DYNAMIC, "int8-dynamic"), (_PAIRS, "int8")], ids=str)
def test_a_kept_file_is_called_by_what_it_is(form: Form, name: str, tmp_path: Path) -> None:
    model, shapes = written("pictures", form, tmp_path)
    decibels, lowered = taken("pictures", form, "generic-cpu", tmp_path)
    assert decibels > HEALTHY
    assert any("nothing is quantized twice" in note for note in lowered.notes)
    numbers = Compiler().numbers(lowered.files, {"x": (1, *shapes["x"])})
    assert numbers is not None
    assert true_name(Precision.INT8, numbers) == true_name(Precision.FLOAT32, numbers) == name
    stored = sum(path.stat().st_size for path in lowered.files.values())
    assert stored < 1.3 * len(model.SerializeToString())


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.FLOAT32])
def test_kept_pairs_are_computed_in_integers_by_openvino(precision: Precision, tmp_path: Path) -> None:
    """The weights stay integers in the file; folded they would be float, and so would the layers."""
    from kedge_targets.backends.openvino.compiler import Compiler as OpenVino

    _, lowered = taken("sentences", Form("pairs", weight="uint8"), "intel-cpu", tmp_path, precision)
    assert any("nothing is quantized twice" in note for note in lowered.notes)
    numbers = OpenVino().numbers(lowered.files, {"ids": (1, 12)})
    assert numbers is not None
    assert true_name(precision, numbers) == "int8"

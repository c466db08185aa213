"""Files whose numbers are float16 already: run so, not made twice as large, and quantized like others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnxruntime.transformers.float16 import convert_float_to_float16
from tests.support import lowering
from tests.support.lowering import Calibration, checked_copy, executor, lower
from tests.support.odd_graphs import ODD, Samples

from kedge_targets import registry, target
from kedge_targets.graph.rounding import sqnr_db
from kedge_targets.numerics import Precision


def stored(name: str, lowered: lowering.Lowered) -> dict[str, int]:
    numbers = registry.compiler(target.find(name).backends[0].name).numbers(lowered.files, {"image": (1, 3, 8, 8)})
    assert numbers is not None
    return numbers.weight_bytes


@pytest.mark.parametrize("ends", ["float32", "float16"])
@pytest.mark.parametrize("name", ["generic-cpu", "intel-cpu", "rpi4"])
@pytest.mark.usefixtures("tflite_toolchain")
def test_a_file_in_float16_keeps_its_size_and_its_answers(name: str, ends: str, tmp_path: Path) -> None:
    # With its ends in float32 the converter's Casts stand at the end of the file, which ONNX's checker refuses.
    model = convert_float_to_float16(lowering.classifier(), keep_io_types=ends == "float32")
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    samples = lowering.images(16).astype(ends)
    expected = onnxruntime.InferenceSession(str(path)).run(None, {"image": samples})[0]
    weights = 2 * (8 * 3 * 9 + 16 * 8 * 9 + 4 * 16)
    for precision, floor, kinds in (
        (Precision.FLOAT16, 50, {"float16": weights}),
        (Precision.INT8, 25, {"int8": weights // 2}),
    ):
        made = lower(
            name, checked_copy(path, tmp_path), precision, Calibration("image", samples), tmp_path / precision.value
        )
        got = executor(name, made)({"image": samples})["score"]
        assert (got.dtype, stored(name, made)) == (np.dtype(ends), kinds)
        assert sqnr_db(expected.astype(np.float64), got.astype(np.float64)) > floor


@pytest.mark.parametrize("form", ["weights of float16", "weights of int8, multiplied", "weights of int8, read back"])
def test_weights_stay_as_small_as_they_are_stored(form: str, tmp_path: Path) -> None:
    odd = ODD[form]()
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    made = lower("generic-cpu", checked_copy(path, tmp_path), Precision.FLOAT32, Samples(odd, 4), tmp_path / "out")
    assert made.files[made.entry].stat().st_size < 1.05 * path.stat().st_size


@pytest.mark.usefixtures("tensorrt_toolchain")
def test_a_file_of_integers_brings_its_scales_to_tensorrt(tmp_path: Path) -> None:
    odd = ODD["answers on the way"]()
    path = tmp_path / "model.onnx"
    onnx.save(odd.model, path)
    first = lower("generic-cpu", checked_copy(path, tmp_path), Precision.INT8, Samples(odd, 32), tmp_path / "first")
    quantized = first.files[first.entry]
    given = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(quantized).graph.initializer}
    down = next(node for node in onnx.load(quantized).graph.node if node.input[0] == odd.input)
    step, zero = float(given[down.input[1]]), int(given[down.input[2]])
    furthest = step * max(zero, 255 - zero)
    again = lower(
        "jetson-orin-nano", checked_copy(quantized, tmp_path), Precision.INT8, Samples(odd, 2), tmp_path / "x"
    )
    made = onnx.load(next(file for title, file in again.files.items() if "int8" in title))
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    own = next(node for node in made.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == odd.input)
    assert 127 * float(scales[own.input[1]]) == pytest.approx(furthest, rel=0.01)
    assert any("quantized already" in note for note in again.notes)

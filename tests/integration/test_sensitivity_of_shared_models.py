"""The sensitivity of the MLPerf Tiny networks: every layer, and noises that add up to the whole model's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.support.lowering import Array, Case, ic, kws
from tests.support.networks import Fed

from kedge.quantization.sensitivity import measure
from kedge_targets.graph import fakequant, layers, library, model_reader, qonnx, quantizer_preparation, rounding
from kedge_targets.numerics import Plan, Precision


def answers(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = library.load().SessionOptions()
    options.log_severity_level = 4
    session = library.opened(qonnx.expand_qonnx(model).SerializeToString(), options, where="g")
    made: Array = session.run(None, feeds)[0]
    return made


@pytest.mark.shared_data
@pytest.mark.parametrize("case", [ic, kws])
def test_the_noises_of_the_layers_make_that_of_the_model(shared_data: Path, tmp_path: Path, case: Any) -> None:
    given: Case = case(shared_data)
    model = model_reader.read(given.model)
    name = model.graph.input[0].name
    fed = Fed(**{name: given.calibration})
    told = measure(model, fed, [Precision.INT8, Precision.W4A4], limit_samples=50, seconds=120)
    assert (told.metric, told.samples, told.left_out) == ("agreement", 50, ())
    assert [one.name for one in told.layers] == [layer.name for layer in layers.layers(model)]
    assert all(one.sqnr_db["w4a4"] < one.sqnr_db["int8"] - 8 for one in told.layers)
    assert all(one.drop["int8"] <= 0.06 for one in told.layers)
    made = quantizer_preparation.prepare(model, tmp_path / "prepared.onnx", quantized=True)
    feeds = {name: given.calibration[:50]}
    plan = Plan(default=Precision.INT8)
    simulated = fakequant.insert_quantizers(made, plan, fakequant.calibrate(made, plan, [feeds]))
    whole = rounding.sqnr_db(answers(made, feeds), answers(simulated, feeds))
    summed = -10 * np.log10(sum(10 ** (-one.sqnr_db["int8"] / 10) for one in told.layers))
    assert whole == pytest.approx(summed, abs=4)

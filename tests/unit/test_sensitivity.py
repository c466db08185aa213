"""The sensitivity of layers: the figures are those of the whole graph simulated, the worst layer is named, time and
samples are bounded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper
from tests.support.lowering import classifier, images
from tests.support.networks import Fed, attention, residual, with_outliers

from kedge.evaluation import kinds, metric
from kedge.quantization.sensitivity import LARGEST_DB, Sensitivity, measure
from kedge_protocol import codec
from kedge_protocol.errors import DatasetError, ModelError
from kedge_targets.graph import fakequant, layers, library, model_reader, qonnx, quantizers, rounding, weight_encodings
from kedge_targets.numerics import Granularity, Plan, Precision, QuantizationScheme, RangeMethod, Reach

Array = npt.NDArray[Any]


def run(model: onnx.ModelProto, feeds: dict[str, Array]) -> Array:
    options = library.load().SessionOptions()
    options.log_severity_level = 4
    session = library.opened(qonnx.expand_qonnx(model).SerializeToString(), options, where="g")
    made: Array = session.run(None, feeds)[0]
    return made


def fed(model: onnx.ModelProto, count: int = 24) -> Fed:
    rng = np.random.default_rng(7)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]] for value in model.graph.input
    }
    arrays = {name: rng.standard_normal((count, *shape)).astype(np.float32) for name, shape in shapes.items()}
    if "mask" in arrays:
        arrays["mask"] = np.where(np.arange(5) < 3, 0, -10000).astype(np.float32).reshape(1, 1, 5).repeat(count, 0)
    return Fed(**arrays)


def agreement(model: onnx.ModelProto) -> metric.Choice:
    """The user says that the output has answers."""
    name = model.graph.output[0].name
    seen = kinds.ClassifiedOutput(name=name, kind=kinds.OutputKind.CLASSES, why="--metric names it")
    return metric.Choice(kind="agreement", name="agreement", output=name, kinds=(seen,))


def whole(
    model: onnx.ModelProto, given: Fed, layer: str, precision: Precision, *, way: QuantizationScheme | None = None
) -> tuple[Array, Array]:
    """The float model's answers, and those of the whole graph with one layer simulated by nodes in it."""
    usual = quantizers.Style() if way is None else quantizers.style_for(way)
    style = quantizers.FABRIC if precision is Precision.W4A4 else usual
    style = replace(style, at_source=False, relus=False, residuals=False)
    method = RangeMethod.MSE if precision is Precision.W4A4 else RangeMethod.MIN_MAX
    plan = Plan(default=Precision.FLOAT32, layers={layer: precision}, range_method=method)
    found = fakequant.calibrate(model, plan, [given.arrays], style=style)
    return run(model, given.arrays), run(fakequant.insert_quantizers(model, plan, found, style=style), given.arrays)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT8_DYNAMIC, Precision.W4A4])
@pytest.mark.parametrize("make", [classifier, residual, attention])
def test_the_figures_are_those_of_the_whole_graph(make: Any, precision: Precision) -> None:
    model = model_reader.infer_shapes(make(), where="test")
    given = fed(model)
    told = measure(model, given, [precision], choice=agreement(model))
    assert told.samples == 24
    assert [one.name for one in told.layers] == [layer.name for layer in layers.layers(model)]
    for one in told.layers:
        if precision is Precision.W4A4 and one.weights == 0:
            assert one.sqnr_db == {}
            continue
        exact, simulated = whole(model, given, one.name, precision)
        assert one.sqnr_db[precision.value] == pytest.approx(rounding.sqnr_db(exact, simulated), abs=0.5)
        same = float((exact.argmax(axis=-1) == simulated.argmax(axis=-1)).mean())
        assert told.metric == "agreement"
        assert one.drop[precision.value] == pytest.approx(1 - same, abs=0.05)


def test_ranges_reach_as_far_as_those_of_the_scheme() -> None:
    model = model_reader.infer_shapes(classifier(), where="test")
    given = fed(model)
    figures = {}
    for reach in (Reach.OBSERVED, Reach.FURTHER):
        way = QuantizationScheme(
            activation="uint8",
            weight="int8",
            symmetric_activation=False,
            granularity=Granularity.PER_CHANNEL,
            reach=reach,
        )
        told = measure(model, given, [Precision.INT8], quantized=way)
        figures[reach] = told.layers[0].sqnr_db["int8"]
        exact, simulated = whole(model, given, told.layers[0].name, Precision.INT8, way=way)
        assert figures[reach] == pytest.approx(rounding.sqnr_db(exact, simulated), abs=0.05)
    assert abs(figures[Reach.FURTHER] - figures[Reach.OBSERVED]) > 0.2


def test_where_nothing_is_right_or_wrong_layers_are_ranked_by_noise_alone() -> None:
    model = classifier()
    users = metric.Choice(kind=metric.USER, name="mine.py:f", function="mine.py:f")
    for choice in (None, users):
        told = measure(model, fed(model), [Precision.INT8], choice=choice)
        assert told.metric == "sqnr"
        assert all(one.drop == {} and one.sqnr_db["int8"] > 20 for one in told.layers)


@pytest.mark.parametrize("precision", [Precision.INT4, Precision.CODEBOOK4, Precision.LOG8])
def test_weights_stored_small(precision: Precision) -> None:
    model = classifier()
    given = fed(model)
    told = measure(model, given, [precision], group_size=16)
    for one, layer in zip(told.layers, layers.layers(model), strict=True):
        altered = onnx.ModelProto()
        altered.CopyFrom(model)
        for tensor in altered.graph.initializer:
            if tensor.name == layer.weight:
                value = weight_encodings.dequantized(
                    numpy_helper.to_array(tensor), precision, axis=layer.axis or 0, group_size=16
                )
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        wanted = rounding.sqnr_db(run(model, given.arrays), run(altered, given.arrays))
        assert one.sqnr_db[precision.value] == pytest.approx(wanted, abs=0.2)


def test_half_precision_costs_least() -> None:
    told = measure(attention(), fed(attention()), [Precision.FLOAT16, Precision.INT8, Precision.FLOAT32])
    assert [one.operator for one in told.layers] == ["MatMul"] * 5
    for one in told.layers:
        assert set(one.sqnr_db) == {"float16", "int8"}
        assert one.sqnr_db["float16"] > 55
        assert one.sqnr_db["float16"] > one.sqnr_db["int8"] + 15


@pytest.mark.parametrize("granularity", list(Granularity))
def test_a_layer_with_outliers_is_named_worst(granularity: Granularity) -> None:
    model = with_outliers()
    way = QuantizationScheme(activation="int8", weight="int8", symmetric_activation=True, granularity=granularity)
    told = measure(model, fed(model, 64), [Precision.INT8], quantized=way, choice=agreement(model))
    worst, second = sorted(told.layers, key=lambda one: one.sqnr_db["int8"])[:2]
    # With one scale for all weights the first layer suffers of the same unit, on the other side of the Relu.
    assert worst.name in (["middle"] if granularity is Granularity.PER_CHANNEL else ["first", "middle"])
    assert worst.sqnr_db["int8"] < 12
    assert second.sqnr_db["int8"] > worst.sqnr_db["int8"]
    assert worst.drop["int8"] == max(one.drop["int8"] for one in told.layers) > 0.05
    healthy = measure(with_outliers(factor=1.0), fed(model, 64), [Precision.INT8], quantized=way)
    assert min(one.sqnr_db["int8"] for one in healthy.layers) > 25


def test_labels_make_it_top1() -> None:
    model = classifier()
    given = fed(model, 40)
    answers = run(model, given.arrays).argmax(axis=1)
    labels = np.where(np.arange(40) % 4 == 0, (answers + 1) % 4, answers)
    told = measure(model, given, [Precision.W2A2, Precision.INT8], labels=labels)
    assert told.metric == "top1"
    for one in told.layers:
        assert one.drop["int8"] <= 0.1
        assert one.sqnr_db["w2a2"] < one.sqnr_db["int8"]
    with pytest.raises(DatasetError, match="classes"):
        measure(model, given, [Precision.INT8], labels=labels + 9)


def test_only_the_samples_asked_for_are_read() -> None:
    model = classifier()
    given = Fed(image=images(100))
    told = measure(model, given, [Precision.INT8], limit_samples=10)
    assert told.samples == 10
    assert given.read <= 64
    poisoned = Fed(image=np.concatenate([images(10), np.full((90, 3, 8, 8), np.nan, np.float32)]))
    assert measure(model, poisoned, [Precision.INT8], limit_samples=10) == told


def test_little_time_measures_little_and_says_so() -> None:
    model = classifier()
    told = measure(model, Fed(image=images(200)), list(Precision), limit_samples=200, seconds=0.0)
    assert sum(len(one.sqnr_db) for one in told.layers) == 1
    assert told.samples >= 1
    assert told.left_out[0] == "ranges of activations are those of 1 of 200 samples"
    assert "the time was up before first: w3a3" in told.left_out[1]
    assert told.left_out[2] == f"the time was up after {told.samples} of 200 samples"


def test_a_fixed_batch_and_one_sample() -> None:
    free = measure(classifier(), Fed(image=images(6)), [Precision.INT8])
    fixed = measure(classifier(batch=1), Fed(image=images(6)), [Precision.INT8])
    for one, other in zip(free.layers, fixed.layers, strict=True):
        assert one.sqnr_db["int8"] == pytest.approx(other.sqnr_db["int8"], abs=0.1)
    assert measure(classifier(batch=1), Fed(image=images(1)), [Precision.INT8]).samples == 1
    with pytest.raises(DatasetError, match="no sample"):
        measure(classifier(), Fed(image=images(0)), [Precision.INT8])


def test_batch_normalization_is_folded_before_and_names_are_the_models() -> None:
    model = classifier()
    scale = np.random.default_rng(0).uniform(0.1, 30, 8).astype(np.float32)
    for name, value in (("g", scale), ("zero", np.zeros(8, np.float32)), ("one", np.ones(8, np.float32))):
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    norm = onnx.helper.make_node(
        "BatchNormalization", ["c1", "g", "zero", "zero", "one"], ["n1"], name="norm", epsilon=0.0
    )
    model.graph.node.insert(1, norm)
    model.graph.node[2].input[0] = "n1"
    told = measure(model, Fed(image=images(16)), [Precision.INT8])
    assert [one.name for one in told.layers] == ["first", "second", "last"]
    way = QuantizationScheme(
        activation="uint8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_TENSOR
    )
    tensorwise = measure(model, Fed(image=images(16)), [Precision.INT8], quantized=way)
    # One scale for channels that the normalization made unlike: visible only where it was folded into the weights.
    assert tensorwise.layers[0].sqnr_db["int8"] < told.layers[0].sqnr_db["int8"] - 3


def test_progress_is_told_and_nan_is_named() -> None:
    heard: list[tuple[str, int, int]] = []
    measure(classifier(), Fed(image=images(8)), [Precision.INT8], progress=lambda *said: heard.append(said))
    assert heard == [("sensitivity", 1, 3), ("sensitivity", 2, 3), ("sensitivity", 3, 3)]
    with pytest.raises(ModelError, match="NaN"):
        measure(classifier(), Fed(image=np.full((2, 3, 8, 8), np.nan, np.float32)), [Precision.INT8])


def test_it_travels_as_json() -> None:
    told = measure(classifier(), Fed(image=np.zeros((3, 3, 8, 8), np.float32)), [Precision.INT8])
    assert codec.decode(codec.encode(told), Sensitivity, where="test") == told
    assert all(-LARGEST_DB <= value <= LARGEST_DB for one in told.layers for value in one.sqnr_db.values())

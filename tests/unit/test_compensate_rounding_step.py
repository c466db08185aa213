"""The step that rounds int8 weights together: the grid of the backend, a lower error, layers in float untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import Samples
from tests.support.pruning import answers as run

from kedge.step import Context
from kedge.steps.compensate_rounding import CompensateRounding, CompensateRoundingOptions
from kedge_protocol.errors import ConfigError
from kedge_targets.graph import gptq, rounding
from kedge_targets.integer_saturation import FULL_RANGE, SEVEN_BITS
from kedge_targets.numerics import Plan, Precision, QuantizationScheme

Array = npt.NDArray[Any]


def network() -> onnx.ModelProto:
    """Conv and BatchNormalization, grouped Conv, each with a Relu; Flatten and Gemm."""
    rng = np.random.default_rng(0)

    def stored(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["c1", "s", "b", "m", "v"], ["n1"], name="norm"),
        helper.make_node("Relu", ["n1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2"], ["c2"], name="second", group=2, pads=[1] * 4),
        helper.make_node("Relu", ["c2"], ["r2"], name="relu2"),
        helper.make_node("Flatten", ["r2"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w3"], ["y"], name="last", transB=1),
    ]
    weights = [stored("w1", 16, 3, 3, 3), stored("w2", 8, 8, 3, 3), stored("w3", 10, 8 * 64)]
    weights += [numpy_helper.from_array(rng.uniform(0.5, 2, 16).astype(np.float32), name) for name in "sv"]
    weights += [stored("b", 16), stored("m", 16)]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(made)


def smooth(count: int, seed: int) -> Array:
    """Pictures whose neighbours are alike, as in photos."""
    values = np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).cumsum(axis=2).cumsum(axis=3)
    return (values / 8).astype(np.float32)


def applied(model: onnx.ModelProto, folder: Path, plan: Plan, **options: Any) -> tuple[onnx.ModelProto, Context]:
    context = Context(teacher=model, samples=Samples(x=smooth(24, 1)), plan=plan, workdir=folder)
    return CompensateRounding(CompensateRoundingOptions(**options)).apply(model, context), context


def test_what_one_plan_rounded_is_not_rounded_again_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = network(), []
    measure = gptq.products

    def counted(graph: onnx.ModelProto, samples: Any, precisions: Any, **more: Any) -> dict[str, Array]:
        asked.append(sorted(precisions))
        return measure(graph, samples, precisions, **more)

    monkeypatch.setattr(gptq, "products", counted)

    def rounded(memo: Path | None, *floats: str) -> dict[str, Array]:
        plan = Plan(default=Precision.INT8, scheme=FULL_RANGE, layers=dict.fromkeys(floats, Precision.FLOAT32))
        context = Context(teacher=model, samples=Samples(x=smooth(24, 1)), plan=plan, workdir=tmp_path, memo=memo)
        return weights_of(CompensateRounding(CompensateRoundingOptions()).apply(model, context))

    plans = (("first",), (), ("second",))
    shared = [rounded(tmp_path, *floats) for floats in plans]
    assert asked == [["last", "second"], ["first"], []]
    for floats, mine in zip(plans, shared, strict=True):
        alone = rounded(None, *floats)
        assert all(np.array_equal(mine[name], alone[name]) for name in alone)
    other = Plan(default=Precision.INT8, scheme=SEVEN_BITS)
    context = Context(teacher=model, samples=Samples(x=smooth(24, 1)), plan=other, workdir=tmp_path, memo=tmp_path)
    CompensateRounding(CompensateRoundingOptions()).apply(model, context)
    assert asked[-1] == ["first", "last", "second"]


def weights_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def rounded_alone(model: onnx.ModelProto, most: int) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for tensor in made.graph.initializer:
        if tensor.name in ("w1", "w2", "w3"):
            weight = numpy_helper.to_array(tensor)
            scale = np.abs(weight).reshape(len(weight), -1).max(axis=1) / most
            tensor.CopyFrom(
                numpy_helper.from_array(rounding.fake_quantize(weight, scale, 0, -most, most, axis=0), tensor.name)
            )
    return made


@pytest.mark.parametrize(("scheme", "most"), [(FULL_RANGE, 127), (SEVEN_BITS, 64)])
def test_weights_lie_on_the_backends_grid_and_err_less(tmp_path: Path, scheme: QuantizationScheme, most: int) -> None:
    model = network()
    made, context = applied(model, tmp_path, Plan(default=Precision.INT8, scheme=scheme))
    again = rounded_alone(made, most)
    for name in ("w1", "w2", "w3"):
        np.testing.assert_allclose(weights_of(made)[name], weights_of(again)[name], rtol=0, atol=1e-6)
    fresh = smooth(32, 2)
    want = run(model, {"x": fresh})
    folded, _ = applied(model, tmp_path, Plan(default=Precision.FLOAT32))
    errors = [float(((run(one, {"x": fresh}) - want) ** 2).sum()) for one in (made, rounded_alone(folded, most))]
    assert errors[0] < 0.7 * errors[1]
    assert context.figures["compensate-rounding.layers"] == 3
    assert context.figures["compensate-rounding.gain_db"] > 1


def test_layers_in_float_keep_their_weights(tmp_path: Path) -> None:
    plan = Plan(default=Precision.INT8, scheme=FULL_RANGE, layers={"second": Precision.FLOAT32})
    made, _ = applied(network(), tmp_path, plan)
    assert np.array_equal(weights_of(made)["w2"], weights_of(network())["w2"])
    assert not np.array_equal(weights_of(made)["w3"], weights_of(network())["w3"])


def test_a_plan_that_rounds_nothing_changes_nothing(tmp_path: Path) -> None:
    made, context = applied(network(), tmp_path, Plan(default=Precision.FLOAT32))
    assert np.array_equal(weights_of(made)["w3"], weights_of(network())["w3"])
    assert "rounds no weights" in context.notes[0]
    with pytest.raises(ConfigError, match="samples is below 1"):
        applied(network(), tmp_path, Plan(default=Precision.INT8), samples=0)


def test_what_was_rounded_is_rounded_to_itself() -> None:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((200, 32)) @ rng.standard_normal((32, 32))
    weight, product = rng.standard_normal((6, 32)).astype(np.float32), (rows.T @ rows)[None]
    once, gain = gptq.round_to_integers(weight, product, axis=0, most=127)
    twice, _ = gptq.round_to_integers(once, product, axis=0, most=127)
    np.testing.assert_allclose(twice, once, rtol=0, atol=1e-6)
    assert gain > 3
    assert np.abs(once).max(axis=1) == pytest.approx(np.abs(weight).max(axis=1), rel=1e-6)

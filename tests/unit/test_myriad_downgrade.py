"""A graph of today becomes one that OpenVINO 2021.4 reads, and computes the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.myriad import downgrade, processor, representation
from kedge_targets.backends.myriad.origins import Origins
from kedge_targets.backends.openvino import emulation, library
from kedge_targets.graph import library as reference
from kedge_targets.graph import model_reader

Array = npt.NDArray[Any]
node = helper.make_node


def model_of(nodes: list[onnx.NodeProto], shape: tuple[int, ...], **constants: Any) -> onnx.ModelProto:
    """A graph from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def lowered(model: onnx.ModelProto, folder: Path) -> tuple[list[str], Path, list[str], list[str]]:
    """What was replaced, the representation, and the names of its inputs and outputs."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    given_model = model_reader.load(path)
    read = library.load().Core().read_model(str(path))
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(read)
    representation.rename(read, {"x", "y", *(one.name for one in given_model.graph.node)})
    replaced = downgrade.downgrade(read, Origins(read, given_model).node_of)
    representation.halve(read)
    files = representation.save(read, folder, names={"x", "y"})
    inputs = [port.get_node().get_friendly_name() for port in read.inputs]
    return replaced, files["model.xml"], inputs, [processor.made_by(port) for port in read.outputs]


def opsets(entry: Path) -> set[int]:
    return {int(found) for found in re.findall(r'version="opset(\d+)"', entry.read_text(encoding="utf-8"))}


PICTURE = (1, 4, 8, 8)
RNG = np.random.default_rng(0)
CHANNELS = {"s": RNG.random(4).astype(np.float32) + 0.5, "b": RNG.random(4).astype(np.float32)}

CASES: dict[str, tuple[str | None, list[onnx.NodeProto], tuple[int, ...], dict[str, Any]]] = {
    "softmax": ("Softmax", [node("Softmax", ["x"], ["y"], axis=-1)], (2, 5), {}),
    "max pool": (
        "MaxPool",
        [node("MaxPool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1)],
        PICTURE,
        {},
    ),
    "average pool": (
        "AvgPool",
        [node("AveragePool", ["x"], ["y"], kernel_shape=[2, 2], ceil_mode=1, count_include_pad=1, pads=[1, 1, 1, 1])],
        PICTURE,
        {},
    ),
    "gather from the end": ("Gather", [node("Gather", ["x", "i"], ["y"], axis=1)], PICTURE, {"i": [-1, 0]}),
    "slice": (
        "Slice",
        [node("Slice", ["x", "a", "e", "c", "d"], ["y"])],
        PICTURE,
        {"a": [1, -3], "e": [-1, 2**31], "c": [2, 3], "d": [2, 1]},
    ),
    "resize by scales": (
        "Interpolate",
        [node("Resize", ["x", "", "f"], ["y"], mode="nearest")],
        PICTURE,
        {"f": np.array([1, 1, 2, 2], np.float32)},
    ),
    "resize to sizes": (
        "Interpolate",
        [node("Resize", ["x", "", "", "z"], ["y"], mode="linear")],
        PICTURE,
        {"z": [1, 4, 16, 12]},
    ),
    "pad": ("Pad", [node("Pad", ["x", "p"], ["y"])], PICTURE, {"p": [0, 0, 1, 1, 0, 0, 2, 1]}),
    "top k": ("TopK", [node("TopK", ["x", "k"], ["y", "i"], axis=1)], PICTURE, {"k": [2]}),
    "identity": ("Identity", [node("Identity", ["x"], ["y"])], PICTURE, {}),
    "softsign": ("SoftSign", [node("Softsign", ["x"], ["y"])], PICTURE, {}),
    "log softmax": ("LogSoftmax", [node("LogSoftmax", ["x"], ["y"], axis=1)], PICTURE, {}),
    "hard sigmoid": ("HardSigmoid", [node("HardSigmoid", ["x"], ["y"], alpha=0.17)], PICTURE, {}),
    "batch normalization": (
        "BatchNormInference",
        [node("BatchNormalization", ["x", "s", "b", "b", "s"], ["y"])],
        PICTURE,
        CHANNELS,
    ),
    "difference of tensors": (
        "Subtract",
        [node("Relu", ["x"], ["r"]), node("Sub", ["x", "r"], ["y"])],
        PICTURE,
        {},
    ),
    "quotient of tensors": (
        "Divide",
        [node("Exp", ["x"], ["r"]), node("Div", ["x", "r"], ["y"])],
        PICTURE,
        {},
    ),
    "quotient by a constant": ("Divide", [node("Div", ["x", "c"], ["y"])], PICTURE, {"c": np.float32(3)}),
    "gemm without a bias": (
        None,
        [node("Gemm", ["x", "w"], ["y"])],
        (1, 6),
        {"w": np.random.default_rng(3).standard_normal((6, 3)).astype(np.float32)},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_newer_than_opset_7_computes_the_same_without_it(name: str, tmp_path: Path) -> None:
    kind, nodes, shape, constants = CASES[name]
    model = model_of(nodes, shape, **constants)
    replaced, entry, inputs, outputs = lowered(model, tmp_path)
    assert replaced == ([kind] if kind else [])
    assert max(opsets(entry)) <= 7
    sample = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    session = reference.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(["y"], {"x": sample})[0]
    # Weights are FP16 there.
    np.testing.assert_allclose(processor.cpu(entry, inputs, outputs).run([sample])[0], expected, rtol=2e-3, atol=2e-3)


def test_sums_with_0_and_products_with_1_are_gone(tmp_path: Path) -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("Add", ["r", "z"], ["a"]), node("Mul", ["a", "o"], ["y"])]
    _, entry, _, outputs = lowered(
        model_of(nodes, (1, 4), z=np.zeros(4, np.float32), o=np.ones(4, np.float32)), tmp_path
    )
    text = entry.read_text(encoding="utf-8")
    assert 'type="Add"' not in text
    assert 'type="Multiply"' not in text
    assert len(outputs) == 1


@pytest.mark.parametrize(
    ("operator", "shape", "constants", "attributes", "layer"),
    [
        ("LayerNormalization", (1, 4, 8), {"s": np.ones(8, np.float32)}, {"axis": -1}, "MVN"),
        ("LayerNormalization", (1, 8), {"s": np.ones(8, np.float32)}, {}, "MVN"),
        ("GroupNormalization", PICTURE, {"s": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, {"num_groups": 2},
         "GroupNormalization"),
        ("IsNaN", PICTURE, {}, {}, "IsNaN"),
        ("MaxPool", PICTURE, {}, {"kernel_shape": [3, 3], "dilations": [2, 2]}, "MaxPool"),
    ],
)  # fmt: skip
def test_what_the_old_release_cannot_do_is_refused_with_its_layer_and_node(
    operator: str, shape: tuple[int, ...], constants: Any, attributes: Any, layer: str, tmp_path: Path
) -> None:
    nodes = [
        node(operator, ["x", *constants], ["t"], name="the_one", **attributes),
        node("Cast", ["t"], ["u"], name="cast", to=TensorProto.FLOAT),
        node("Relu", ["u"], ["y"], name="after"),
    ]
    model = model_of(nodes, shape, **constants)
    if operator == "GroupNormalization":  # of opset 18, with a scale for each group
        model.opset_import[0].version = 18
    with pytest.raises(UnsupportedOperatorError, match=rf"'the_one'.*{layer}"):
        lowered(model, tmp_path)


def test_weights_are_fp16_and_what_is_beyond_its_range_is_cut(tmp_path: Path) -> None:
    read = (
        library.load()
        .Core()
        .read_model(
            model_of(
                [node("Mul", ["x", "c"], ["y"])], (3,), c=np.array([1e6, 0.1, -np.inf], np.float32)
            ).SerializeToString()
        )
    )
    assert representation.halve(read) == 1
    constants = [one for one in read.get_ordered_ops() if one.get_type_name() == "Constant"]
    assert [one.get_element_type().get_type_name() for one in constants] == ["f16"]
    np.testing.assert_array_equal(constants[0].get_data(), np.array([65504, 0.1, -np.inf], np.float16))


@settings(deadline=None, max_examples=20)
@given(arrays(np.float32, (1, 64), elements=st.floats(-60000, 60000, width=32)))
def test_rounded_layers_hold_what_fp16_holds(values: Array) -> None:
    openvino = library.load()
    read = openvino.Core().read_model(model_of([node("Neg", ["x"], ["y"])], (1, 64)).SerializeToString())
    emulation.round_layers(read, emulation.HALF_BITS)
    answer = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})([values])[0]
    # FP16 has fewer bits still below its smallest normal number, which the emulation leaves out.
    normal = np.abs(values) >= np.finfo(np.float16).tiny
    np.testing.assert_array_equal(answer[normal], -values[normal].astype(np.float16).astype(np.float32))

"""An ONNX graph as torch computes it: every operator that is known answers as ONNX says, and whole models as ONNX
Runtime does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.case.test_case import TestCase
from onnx.backend.test.loader import load_model_tests

from kedge.training import operators
from kedge.training.network import Network
from kedge.training.weights import Role
from kedge_protocol.errors import StepError

Array = npt.NDArray[Any]

# What torch has no numbers for, or training has no use for.
_TYPES = {
    TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL, TensorProto.UINT8, TensorProto.INT8,
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[TestCase]:
    """ONNX's own test of each operator that is known here, as far as its types are those of a network's."""
    known = {operator for operator, domain in operators.known() if not domain}
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of making the cases
        every = load_model_tests(kind="node")
    for case in every:
        graph = case.model.graph
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        if {node.op_type for node in graph.node} <= known and kinds <= _TYPES:
            found.append(case)
    return found


def answers(model: onnx.ModelProto, feeds: dict[str, Array]) -> list[Array]:
    network = Network(model)
    with torch.no_grad():
        made = network({name: torch.from_numpy(np.array(array)) for name, array in feeds.items()})
    return [tensor.numpy() for tensor in made.values()]


def answered(case: TestCase) -> list[Array] | str:
    """What torch answers to a case, or why it does not."""
    given = case.data_sets[0][0]
    names = [value.name for value in case.model.graph.input]
    try:
        return answers(case.model, {name: np.asarray(array) for name, array in zip(names, given, strict=False)})
    except StepError as error:
        return str(error)


def test_there_are_cases_of_nearly_every_operator(cases: list[TestCase]) -> None:
    tested = {node.op_type for case in cases for node in case.model.graph.node}
    known = {operator for operator, domain in operators.known() if not domain}
    assert len(cases) > 300
    assert len(known - tested) <= 0.2 * len(known), sorted(known - tested)


def assert_right(case: TestCase) -> None:
    found = answered(case)
    if isinstance(found, str):  # a mode of it that is not known here is told, never guessed
        assert any(node.op_type in found or node.name in found for node in case.model.graph.node), found
        return
    for got, expected in zip(found, case.data_sets[0][1], strict=True):
        wanted = np.asarray(expected)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(
            got.astype(np.float64), wanted.astype(np.float64), rtol=max(1e-3, case.rtol), atol=max(1e-4, case.atol)
        )


def test_every_operator_answers_as_onnx_says_or_is_refused(cases: list[TestCase]) -> None:
    # One test for all: making the cases takes longer than running them, and would be done at every collection.
    wrong = {}
    for case in cases:
        try:
            assert_right(case)
        except Exception as error:  # noqa: BLE001 -- whatever a case raises is told with its name
            wrong[case.name] = repr(error)
    assert not wrong


def test_most_cases_are_answered_and_not_refused(cases: list[TestCase]) -> None:
    refused = [case.name for case in cases if isinstance(answered(case), str)]
    assert len(refused) <= 0.15 * len(cases), refused


@pytest.mark.parametrize(
    ("operator", "more"),
    [("MaxPool", {}), ("AveragePool", {}), ("AveragePool", {"count_include_pad": 1, "pads": [1, 1, 1, 1]})],
)
def test_a_window_far_larger_than_the_map_needs_no_memory(operator: str, more: dict[str, Any]) -> None:
    """As transformers' EfficientNet ends; padded to its window the map would take 160 GB."""
    window = {"kernel_shape": [200_000, 200_000], "strides": [200_000, 200_000], "ceil_mode": 1}
    kinds = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in
             (("x", [2, 3, 4, 5]), ("y", [2, 3, 1, 1]))]  # fmt: skip
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"], **window, **more)], "g", kinds[:1], kinds[1:])
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    (found,) = answers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9), {"x": x})
    area = 6 * 7 if more else 4 * 5
    wanted = x.max(axis=(2, 3)) if operator == "MaxPool" else x.sum(axis=(2, 3)) / area
    np.testing.assert_allclose(found[..., 0, 0], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["ic_resnet8", "kws_dscnn", "mnist_cnn"])
def test_a_whole_model_answers_as_onnx_runtime_does(name: str, shared_data: Path) -> None:
    path = shared_data / "models" / f"{name}.onnx"
    model = onnx.load(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 4 for size in entry.shape]
    x = np.random.default_rng(0).random(shape).astype(np.float32)
    (found,) = answers(model, {entry.name: x})
    np.testing.assert_allclose(found, session.run(None, {entry.name: x})[0], rtol=1e-3, atol=1e-4)


def small() -> onnx.ModelProto:
    random = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name)

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first"),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("Gemm", ["r", "v"], ["y"], name="last"),
        ],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [weight("w", 3, 5), weight("b", 5), weight("v", 5, 2)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_is_learnt_goes_back_into_the_same_graph() -> None:
    model = small()
    network = Network(model)
    assert network.roles == {"w": Role.WEIGHT, "b": Role.BIAS, "v": Role.WEIGHT}
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        network({"x": x})["y"].square().mean().backward()
        optimizer.step()
    written = network.written()
    with torch.no_grad():
        wanted = network({"x": x})["y"].numpy()
    session = onnxruntime.InferenceSession(written.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], wanted, rtol=1e-4, atol=1e-5)
    assert [node.SerializeToString() for node in written.graph.node] == [
        node.SerializeToString() for node in model.graph.node
    ]
    assert model.SerializeToString() == small().SerializeToString()


def test_an_operator_that_torch_cannot_compute_is_named() -> None:
    model = small()
    model.graph.node[1].op_type = "NonMaxSuppression"
    with pytest.raises(StepError, match="NonMaxSuppression"):
        Network(model)

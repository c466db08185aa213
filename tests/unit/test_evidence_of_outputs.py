"""What a graph tells of its outputs: the operator behind them, through branches and what keeps probabilities so."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from kedge.evaluation import kinds
from kedge.evaluation.kinds import GraphEvidence, OutputKind


def value(name: str) -> object:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def evidence(*nodes: object, inner: tuple[str, ...] = ("Identity", "Identity")) -> GraphEvidence:
    """Of ``y``, made by nodes from the input ``x`` and ``s``, its sigmoid; ``b`` is a branch of either operator of
    ``inner`` over ``s``."""
    sides = [
        helper.make_graph([helper.make_node(operator, ["s"], ["inner"])], operator, [], [value("inner")])
        for operator in inner
    ]
    branch = helper.make_node("If", ["c"], ["b"], then_branch=sides[0], else_branch=sides[1])
    sigmoid = helper.make_node("Sigmoid", ["x"], ["s"])
    flag = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([sigmoid, branch, *nodes], "g", [value("x"), flag], [value("y")])
    return kinds.graph_evidence(helper.make_model(graph))["y"]


@pytest.mark.parametrize("operator", ["ReduceMean", "ReduceMax"])
def test_a_sigmoid_is_seen_through_branches_and_means(operator: str) -> None:
    """As Silero's voice detector ends: one number for each sample."""
    found = evidence(helper.make_node(operator, ["b"], ["y"]))
    assert found == GraphEvidence(sigmoid=True, reduced=True)
    one, many = np.full((5, 1), 0.25, np.float32), np.full((5, 3), 0.25, np.float32)
    for array, kind in ((one, OutputKind.PROBABILITY), (many, OutputKind.PROBABILITIES)):
        assert kinds.classify_outputs({"y": array}, graph={"y": found}, inputs={})["y"].kind is kind


def test_a_branch_that_computes_something_else_is_no_probability() -> None:
    assert evidence(helper.make_node("Identity", ["b"], ["y"]), inner=("Identity", "Neg")).mixed


def test_the_mean_of_an_input_is_computed() -> None:
    assert not evidence(helper.make_node("ReduceMean", ["x"], ["y"])).passed
    assert evidence(helper.make_node("Identity", ["x"], ["y"])).passed


def test_the_best_of_class_scores_is_no_longer_class_scores() -> None:
    nodes = helper.make_node("Softmax", ["x"], ["p"]), helper.make_node("ReduceMax", ["p"], ["y"])
    assert not evidence(*nodes).distribution

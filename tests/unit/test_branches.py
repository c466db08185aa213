"""What decides which branch of a graph runs, and the fewest nodes that must stay in float."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from onnx import TensorProto, helper
from tests.support.odd_graphs import ODD

from kedge_targets.graph import branches
from kedge_targets.toolchain.driver_side.fewest import fewest


def deciding(by: str) -> onnx.ModelProto:
    node = helper.make_node

    def branch(name: str) -> onnx.GraphProto:
        inner = node("Relu", ["h"], [name], name=name)
        return helper.make_graph([inner], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    measured = {
        "values": [node("ReduceMean", ["h"], ["m"], name="mean", keepdims=0)],
        "shape": [
            node("Shape", ["h"], ["s"], name="shape"),
            node("ReduceMax", ["s"], ["m"], name="longest", keepdims=0),
        ],
    }[by]
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="product"),
        node("MatMul", ["x", "v"], ["z"], name="beside"),
        *measured,
        node("Greater", ["m", "least"], ["c"], name="greater"),
        node("If", ["c"], ["y"], name="if", then_branch=branch("a"), else_branch=branch("b")),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))


@pytest.mark.parametrize(
    ("by", "found"), [("values", ["product", "mean", "greater"]), ("shape", ["longest", "greater"])]
)
def test_numbers_decide_and_shapes_do_not(by: str, found: list[str]) -> None:
    assert branches.deciding(deciding(by)) == found
    assert "decide which branch" in branches.note(found)[0]
    assert branches.note([]) == ()


def test_what_decides_within_a_branch_is_found_outside_too() -> None:
    model = ODD["branches within branches"]().model
    assert branches.deciding(model) == ["Conv_a", "ReduceMax_most", "Greater_c"]
    assert branches.deciding_within(model) == ["Conv_b", "ReduceMean_mean", "Greater_turned"]


def test_what_a_loop_carries_decides_only_if_it_is_asked() -> None:
    """The body adds a product to what it carries; it ends where ``by`` says."""
    node, value = helper.make_node, helper.make_tensor_value_info
    found = {}
    for by in ("turn", "carried"):
        asked = [node("Less", ["i", "times"], ["go"], name="counted")]
        if by == "carried":
            asked = [
                node("ReduceMax", ["after"], ["largest"], name="largest", keepdims=0),
                node("Less", ["largest", "most"], ["go"], name="measured"),
            ]
        body = helper.make_graph(
            [node("MatMul", ["before", "w"], ["after"], name="product"), *asked],
            "body",
            [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("before", 1, None)],
            [value("go", TensorProto.BOOL, []), value("after", 1, None)],
        )
        nodes = [
            node("MatMul", ["x", "v"], ["h"], name="first"),
            node("Loop", ["", "true", "h"], ["y"], name="loop", body=body),
        ]
        graph = helper.make_graph(nodes, "g", [value("x", 1, None)], [value("y", 1, None)])
        model = helper.make_model(graph)
        found[by] = branches.deciding(model), branches.deciding_within(model)
    assert found == {"turn": ([], ["counted"]), "carried": (["first"], ["product", "largest", "measured"])}


@pytest.mark.parametrize("needed", range(1, 21))
def test_few_nodes_are_kept(needed: int) -> None:
    order = [str(number) for number in range(20)]
    calls = []

    def tried(kept: Sequence[str]) -> tuple[int, bool]:
        calls.append(len(kept))
        return len(kept), len(kept) >= needed

    made, kept = fewest(order, tried)
    assert made == len(kept) >= needed
    assert list(kept) == order[: len(kept)]
    assert len(kept) <= max(1.25 * needed, needed + 1)
    assert len(calls) <= 8


def test_all_nodes_are_kept_where_nothing_helps() -> None:
    assert fewest(["a", "b", "c"], lambda kept: (len(kept), False)) == (3, ("a", "b", "c"))


@pytest.mark.parametrize("needed", [{3}, {19}, {4, 5}, {2, 17}])
def test_nodes_that_are_not_needed_return_to_integers(needed: set[int]) -> None:
    order = list(reversed(range(20)))
    calls = []

    def tried(kept: Sequence[int]) -> tuple[Sequence[int], bool]:
        calls.append(kept)
        return kept, set(kept) >= needed

    made, kept = fewest(order, tried, along=range(20), returns=16)
    assert set(made) == set(kept) >= needed
    assert len(kept) <= len(needed) + 1
    assert len(calls) <= 8 + 16


def test_no_more_trials_are_made_than_allowed() -> None:
    calls = []

    def tried(kept: Sequence[int]) -> tuple[int, bool]:
        calls.append(kept)
        return len(kept), len(kept) == 16

    assert fewest(range(16), tried, along=range(16), returns=3) == (16, tuple(range(16)))
    assert len(calls) == 5 + 2 + 3

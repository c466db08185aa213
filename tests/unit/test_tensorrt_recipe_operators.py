"""Which TensorRT takes a graph, by NVIDIA's tables."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets import target
from kedge_targets.backends.tensorrt import operators
from kedge_targets.backends.tensorrt.recipe import LINES, numbers


def model(*kinds: str, opset: int = 17, domain: str = "") -> onnx.ModelProto:
    """Nodes in a row; what they compute does not matter here."""
    nodes = [
        helper.make_node(kind, [f"t{index}"], [f"t{index + 1}"], name=f"node_{index}", domain=domain)
        for index, kind in enumerate(kinds)
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "row",
        [value("t0", TensorProto.FLOAT, [1, 4])],
        [value(f"t{len(kinds)}", TensorProto.FLOAT, [1, 4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("own", 1)])


def test_the_table_is_of_operators_that_onnx_has_and_goes_up() -> None:
    table = operators.table()
    versions = list(table.opsets)
    assert versions == sorted(versions, key=numbers)
    assert list(table.opsets.values()) == sorted(table.opsets.values())
    assert list(table.operators) == sorted(table.operators, key=numbers)
    named = [name for names in table.operators.values() for name in names]
    assert len(named) == len(set(named))
    # Three of NVIDIA's table were experimental in ONNX once, and are gone.
    gone = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
    assert {name for name in named if not onnx.defs.has(name)} == gone
    assert set(table.costly) <= set(named)
    assert table.lowest_opset == 9


def test_the_table_begins_where_the_recipes_lines_begin() -> None:
    assert next(iter(operators.table().opsets)) == LINES[0].first


def test_a_plain_graph_runs_from_8_6_on() -> None:
    found = operators.fit(model("Conv", "Relu"), "10.3", where="m.onnx")
    assert (found.first, found.notes) == ("8.6", ())


@pytest.mark.parametrize(
    ("opset", "version", "told"),
    [
        (18, "8.6", r"opset 18 needs TensorRT 9\.2, the target has 8\.6\. .*opset 17 or lower"),
        (21, "10.3", r"opset 21 needs TensorRT 10\.15, the target has 10\.3\. .*opset 20 or lower"),
        (99, "11.4", r"opset 99 needs TensorRT newer than is known here"),
    ],
)
def test_an_opset_that_is_too_new_is_told_with_the_highest_that_is_not(opset: int, version: str, told: str) -> None:
    with pytest.raises(LoweringError, match=told):
        operators.fit(model("Relu", opset=opset), version, where="m.onnx")


def test_an_opset_decides_the_first_version() -> None:
    assert operators.fit(model("Relu", opset=20), "10.3", where="m.onnx").first == "10.0"


@pytest.mark.parametrize(
    ("kind", "domain", "version", "told"),
    [
        ("Det", "", "11.4", "m.onnx: node 'node_1': TensorRT's parser does not take operator Det: no TensorRT has it"),
        ("Hardmax", "", "8.6", "operator Hardmax: it came with TensorRT 9.2, the target has 8.6"),
        ("STFT", "", "10.3", "operator STFT: it came with TensorRT 10.5, the target has 10.3"),
        ("Swish", "own", "11.4", "m.onnx: node 'node_1': .*operator own.Swish"),
    ],
)
def test_an_operator_that_a_target_lacks_is_named_with_its_node(
    kind: str, domain: str, version: str, told: str
) -> None:
    graph = model("Relu", kind)
    graph.graph.node[1].domain = domain
    with pytest.raises(UnsupportedOperatorError, match=told):
        operators.fit(graph, version, where="m.onnx")


def test_the_newest_operator_decides_the_first_version() -> None:
    assert operators.fit(model("STFT", "Relu"), "10.13", where="m.onnx").first == "10.5"


def test_operators_known_to_be_costly_are_notes() -> None:
    notes = operators.fit(model("LSTM", "LSTM", "NonZero"), "10.3", where="m.onnx").notes
    assert any(note.startswith("LSTM (2 nodes, first node_0): becomes a loop") for note in notes)
    assert any(note.startswith("NonZero (node_2): ") for note in notes)


def test_an_operator_of_unknown_age_is_a_note_and_no_refusal() -> None:
    (note,) = operators.fit(model("Gelu", opset=20), "10.3", where="m.onnx").notes
    assert "does not say since which TensorRT" in note


@pytest.mark.parametrize("name", ["jetson-orin-nano", "jetson-orin-nx", "jetson-agx-orin", "jetson-thor", "nvidia-gpu"])
def test_each_target_says_a_version_that_a_line_serves(name: str) -> None:
    found = target.find(name)
    assert found.backends[0].name == "tensorrt"
    assert any(line.holds(found.runtimes["tensorrt"]) for line in LINES)

"""A teacher that is another model: paired with the student by name, place and depth."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import Samples, answers, context

from kedge.steps.distil import Distil, DistilOptions
from kedge.training import blocks, losses, teacher_graph
from kedge.training.network import Network
from kedge_protocol.errors import ConfigError
from kedge_targets.graph import model_reader, signature


def perceptron(
    widths: Sequence[int], *, seed: int, source: str = "input", answer: str = "scores", inner: str = "h"
) -> onnx.ModelProto:
    """Layers of these widths with Relu between; input [N, first], output [N, last]."""
    random = np.random.default_rng(seed)
    weights, nodes, last = [], [], source
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        matrix = random.normal(0, (2 / wide) ** 0.5, (wide, narrow)).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"{inner}.w{index}"))
        final = index == len(widths) - 2
        product = answer if final else f"{inner}.p{index}"
        nodes.append(helper.make_node("MatMul", [last, f"{inner}.w{index}"], [product], name=f"{inner}.m{index}"))
        if not final:
            last = f"{inner}.a{index}"
            nodes.append(helper.make_node("Relu", [product], [last], name=f"{inner}.r{index}"))
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info(source, TensorProto.FLOAT, ["N", widths[0]])],
        [helper.make_tensor_value_info(answer, TensorProto.FLOAT, ["N", widths[-1]])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model_reader.infer_shapes(made, where="test")


def encoder(depth: int, *, width: int = 8, seed: int = 0) -> onnx.ModelProto:
    """``depth`` blocks of one attention and one normalization each, then the mean over the length: input
    [N, L, width], output [N, width]."""
    random = np.random.default_rng(seed)
    weights = [numpy_helper.from_array(np.ones(width, np.float32), "one")]
    nodes: list[onnx.NodeProto] = []

    def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [name], name=f"make {name}", **attributes))
        return name

    last = "input"
    for index in range(depth):
        for part in "qkv":
            matrix = random.normal(0, 0.4, (width, width)).astype(np.float32)
            weights.append(numpy_helper.from_array(matrix, f"{part}w{index}"))
            node("MatMul", [last, f"{part}w{index}"], f"{part}{index}")
        turned = node("Transpose", [f"k{index}"], f"kt{index}", perm=[0, 2, 1])
        attention = node("Softmax", [node("MatMul", [f"q{index}", turned], f"s{index}")], f"map{index}", axis=-1)
        mixed = node("MatMul", [attention, f"v{index}"], f"mixed{index}")
        added = node("Add", [mixed, last], f"added{index}")
        last = node("LayerNormalization", [added, "one"], f"norm{index}", axis=-1)
    node("ReduceMean", [last], "meaning", axes=[1], keepdims=0)
    graph = helper.make_graph(
        nodes,
        "encoder",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", "L", width])],
        [helper.make_tensor_value_info("meaning", TensorProto.FLOAT, ["N", width])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model_reader.infer_shapes(made, where="test")


def matched(teacher: onnx.ModelProto, student: onnx.ModelProto) -> onnx.ModelProto:
    return teacher_graph.matched(
        teacher, inputs=signature.inputs(student), outputs=signature.outputs(student), where="teacher"
    )


def found(model: onnx.ModelProto, feed: np.ndarray) -> blocks.Blocks:
    network = Network(model)
    feeds = {"input": torch.from_numpy(feed)}
    outputs = {name: tensor.detach().numpy() for name, tensor in network(feeds).items()}
    with torch.no_grad():
        return blocks.blocks(model, losses.heads(model, outputs), lambda names: network(feeds, tuple(names)))


def test_a_teacher_answers_the_same_under_the_students_names() -> None:
    student = perceptron([6, 4, 3], seed=0, source="input", answer="scores")
    # A tensor inside the teacher has the name of the student's output.
    teacher = perceptron([6, 9, 9, 3], seed=1, source="pixels", answer="classes", inner="scores")
    made = matched(teacher, student)
    onnx.checker.check_model(made, full_check=True)
    raw = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    assert [value.name for value in made.graph.input] == ["input"]
    assert [value.name for value in made.graph.output] == ["scores"]
    assert np.array_equal(answers(made, {"input": raw}), answers(teacher, {"pixels": raw}))
    ours = {name for node in student.graph.node for name in (*node.output, node.name)}
    theirs = {name for node in made.graph.node for name in (*node.output, node.name)}
    assert ours & theirs == {"scores"}


def test_outputs_that_the_student_lacks_are_left_out() -> None:
    student, teacher = perceptron([6, 4, 3], seed=0), perceptron([6, 9, 3], seed=1)
    teacher.graph.output.append(helper.make_tensor_value_info("h.a0", TensorProto.FLOAT, ["N", 9]))
    assert [value.name for value in matched(teacher, student).graph.output] == ["scores"]


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (perceptron([7, 9, 3], seed=1), "its input 'input' is float32 [?, 7], the student's 'input' is float32 [?, 6]"),
        (perceptron([6, 9, 5], seed=1, answer="b"), "its output 'b' is float32 [?, 5], the student's 'scores' is"),
    ],
)
def test_a_teacher_of_another_form_is_refused(teacher: onnx.ModelProto, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        matched(teacher, perceptron([6, 4, 3], seed=0))
    assert said in str(caught.value)


def test_a_teacher_that_wants_more_inputs_is_refused() -> None:
    teacher = perceptron([6, 9, 3], seed=1)
    teacher.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N", 6]))
    with pytest.raises(ConfigError, match="takes an input 'mask' that the student lacks"):
        matched(teacher, perceptron([6, 4, 3], seed=0))


def test_blocks_of_a_transformer_end_at_the_normalization_before_the_next_attention() -> None:
    raw = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    ours, theirs = found(encoder(2), raw), found(encoder(6), raw)
    assert ours.attention == ("map0", "map1")
    assert ours.ends == ("norm0", "norm1")
    assert blocks.layer_map((), ours, theirs) == [(0, 2), (1, 5)]
    maps, ends = blocks.paired(blocks.layer_map(("0:0", "1:4"), ours, theirs), ours, theirs)
    assert maps == {"map0": "map0", "map1": "map4"}
    assert ends == {"norm0": "norm0", "norm1": "norm4"}


@pytest.mark.parametrize(
    ("layers", "said"),
    [(("0-1",), "'0-1' is no pair"), (("0:6",), "block 6 of the teacher, which has 6"), (("2:0",), "of the student")],
)
def test_a_map_of_layers_that_does_not_fit_is_refused(layers: tuple[str, ...], said: str) -> None:
    raw = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    with pytest.raises(ConfigError, match=said):
        blocks.layer_map(layers, found(encoder(2), raw), found(encoder(6), raw))


def test_layers_without_a_teacher_are_refused(tmp_path: Path) -> None:
    model = perceptron([6, 4, 3], seed=0)
    step = Distil(DistilOptions(layers=("0:0",)))
    with pytest.raises(ConfigError, match="none is given"):
        step.apply(model, context(model, Samples(input=np.zeros((8, 6), np.float32)), tmp_path))


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_student_of_another_depth_and_width_learns_from_its_teacher(weight: float, tmp_path: Path) -> None:
    student = encoder(1, seed=7)
    teacher = matched(encoder(3, seed=3), student)
    raw = np.random.default_rng(1).normal(size=(96, 5, 8)).astype(np.float32)
    options = DistilOptions(teacher="other.onnx", steps=150, attention_weight=weight, learning_rate=0.01)
    run = context(teacher, Samples(input=raw[:64]), tmp_path)
    made = Distil(options).apply(student, run)
    wanted = answers(teacher, {"input": raw[64:]})

    def error(model: onnx.ModelProto) -> float:
        return float(np.square(answers(model, {"input": raw[64:]}) - wanted).mean())

    assert error(made) < 0.75 * error(student)

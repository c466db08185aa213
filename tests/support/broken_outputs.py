"""A step of somebody else's that breaks outputs of a model, and a model with outputs of several kinds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

STEP = """
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from kedge.options import Option
from kedge.step import Context, Step


@dataclass(frozen=True, kw_only=True)
class BreakOptions:
    output: Annotated[str, Option("The output to break.")] = ""
    how: Annotated[str, Option("zero, shuffle or clip.")] = "zero"
    start: Annotated[int, Option("The first channel.")] = 0
    stop: Annotated[int, Option("The channel behind the last one.")] = 1 << 30


class Break(Step[BreakOptions]):
    name: ClassVar[str] = "break"
    Options = BreakOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        name = self.options.output
        (batch,) = context.samples.batches(context.samples.samples)
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (answers,) = session.run([name], batch)
        hit = slice(self.options.start, min(self.options.stop, answers.shape[1]))
        made = onnx.ModelProto()
        made.CopyFrom(model)
        for node in made.graph.node:
            for place, output in enumerate(node.output):
                if output == name:
                    node.output[place] = "whole " + name
        getattr(self, self.options.how)(made.graph, name, answers, hit)
        return made

    def put(self, graph, operator, inputs, output, **attributes):
        names = []
        for one in inputs:
            if isinstance(one, np.ndarray):
                graph.initializer.append(numpy_helper.from_array(one, f"{output} {len(graph.initializer)}"))
                one = graph.initializer[-1].name
            names.append(one)
        graph.node.append(helper.make_node(operator, names, [output], name=f"break {output}", **attributes))

    def zero(self, graph, name, answers, hit):
        mask = np.ones((1, *answers.shape[1:]), np.float32)
        mask[:, hit] = 0
        self.put(graph, "Mul", ["whole " + name, mask], name)

    def shuffle(self, graph, name, answers, hit):
        order = np.arange(answers.shape[1])
        order[hit] = np.roll(order[hit], 1)
        self.put(graph, "Gather", ["whole " + name, order], name, axis=1)

    def clip(self, graph, name, answers, hit):
        mean = answers.mean(axis=0, keepdims=True).astype(np.float32)
        edge = np.full_like(mean, np.abs(answers).max() * 2)
        edge[:, hit] = 0.25 * np.abs(answers - mean)[:, hit].max()
        self.put(graph, "Max", ["whole " + name, mean - edge], "low " + name)
        self.put(graph, "Min", ["low " + name, mean + edge], name)
"""

CHANNELS, ROWS, CLASSES = 8, 64, 6


def installed(folder: Path) -> Path:
    """The step as a distribution of its own; the folder for the import path."""
    (folder / "break_of_mine.py").write_text(STEP)
    info = folder / "break_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: break-of-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kedge.steps]\nbreak = break_of_mine:Break\n")
    return folder


def network(outputs: Mapping[str, str]) -> onnx.ModelProto:
    """A convolution with a head for each output.

    Args:
        outputs: name → ``scores`` (a softmax of 6), ``values`` (16 numbers) or ``detections`` (4 rows of boxes in
            pixels beside 6 of scores, for each of 64 places).
    """
    rng = np.random.default_rng(5)
    weights: dict[str, Array] = {"w": rng.normal(0, 0.4, (CHANNELS, 3, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["g"], name="mean"),
        helper.make_node("Flatten", ["g"], ["f"], name="flat"),
    ]
    values = []
    for name, kind in outputs.items():
        shape = {"scores": [CLASSES], "values": [16], "detections": [4 + CLASSES, ROWS]}[kind]
        values.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape]))
        if kind == "detections":
            nodes += _detections(name, weights, rng)
            continue
        weights[f"{name}.w"] = rng.normal(0, 2, (CHANNELS, shape[0])).astype(np.float32)
        product = name if kind == "values" else f"{name}.z"
        nodes.append(helper.make_node("MatMul", ["f", f"{name}.w"], [product], name=f"{name} product"))
        if kind == "scores":
            # Around the middle of what comes, so that every class has answers.
            weights[f"{name}.b"] = (-weights[f"{name}.w"].sum(axis=0) * 0.45).astype(np.float32)
            nodes.append(helper.make_node("Add", [product, f"{name}.b"], [f"{name}.l"], name=f"{name} bias"))
            nodes.append(helper.make_node("Softmax", [f"{name}.l"], [name], name=f"{name} softmax", axis=1))
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        values,
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def _detections(name: str, weights: dict[str, Array], rng: np.random.Generator) -> list[onnx.NodeProto]:
    weights[f"{name}.wb"] = rng.normal(0, 1, (4, CHANNELS, 1, 1)).astype(np.float32)
    weights[f"{name}.ws"] = rng.normal(0, 2, (CLASSES, CHANNELS, 1, 1)).astype(np.float32)
    weights[f"{name}.sb"] = np.full(CLASSES, -2, np.float32)
    weights[f"{name}.px"] = np.array(320, np.float32)
    nodes = [
        helper.make_node("Conv", ["r", f"{name}.wb"], [f"{name}.b"], name=f"{name} boxes"),
        helper.make_node("Conv", ["r", f"{name}.ws", f"{name}.sb"], [f"{name}.s"], name=f"{name} scores"),
    ]
    for part, rows in (("b", 4), ("s", CLASSES)):
        weights[f"{name}.{part} to"] = np.array([0, rows, ROWS])
        nodes += [
            helper.make_node("Reshape", [f"{name}.{part}", f"{name}.{part} to"], [f"{name}.{part}r"]),
            helper.make_node("Sigmoid", [f"{name}.{part}r"], [f"{name}.{part}s"]),
        ]
    return [
        *nodes,
        helper.make_node("Mul", [f"{name}.bs", f"{name}.px"], [f"{name}.pixels"]),
        helper.make_node("Concat", [f"{name}.pixels", f"{name}.ss"], [name], axis=1),
    ]


def pictures(count: int, seed: int) -> Array:
    """Each of a colour of its own, N x 3 x 8 x 8."""
    rng = np.random.default_rng(seed)
    colour = rng.normal(0, 1, (count, 3, 1, 1))
    return np.asarray(colour + rng.normal(0, 0.5, (count, 3, 8, 8)), np.float32)

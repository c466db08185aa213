"""Graphs to prune, and what a pruned graph is held against: the whole one with zeros where channels were read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kedge.pruning.groups import Group, Structure
from kedge.step import Context
from kedge_targets.graph import library
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]


class Samples:
    """Calibration samples of one array."""

    def __init__(self, **arrays: Array) -> None:
        self._arrays = arrays

    @property
    def samples(self) -> int:
        return len(next(iter(self._arrays.values())))

    def batches(self, size: int) -> Any:
        for start in range(0, self.samples, size):
            yield {name: array[start : start + size] for name, array in self._arrays.items()}


def context(teacher: onnx.ModelProto, samples: Any, workdir: Path, **more: Any) -> Context:
    return Context(
        teacher=teacher, samples=samples, plan=Plan(default=Precision.FLOAT32), workdir=workdir, seed=0, **more
    )


def answers(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> Array:
    """The first output, by ONNX Runtime."""
    session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    made: Array = session.run(None, dict(feeds))[0]
    return made


def masked(structure: Structure, removed: Mapping[Group, Sequence[int]]) -> onnx.ModelProto:
    """The whole graph in which nothing that reads the removed channels sees them."""
    model = onnx.ModelProto()
    model.CopyFrom(structure.model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for group, channels in removed.items():
        # What nobody reads is zero where it is made.
        for name, axis in group.consuming or tuple(group.members):
            weight = np.moveaxis(numpy_helper.to_array(tensors[name]).copy(), axis, 0)
            for channel in channels:
                weight[group.members[name, axis][channel]] = 0
            weight = np.ascontiguousarray(np.moveaxis(weight, 0, axis))
            tensors[name].CopyFrom(numpy_helper.from_array(weight, name))
    return model


class Builder:
    """A convolutional network, layer by layer; the newest tensor is ``self.at`` with ``self.channels``."""

    def __init__(self, rng: np.random.Generator, *, batch: int | str = "N") -> None:
        self._rng = rng
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._batch = batch
        self.at, self.channels, self.size = "image", 3, 8

    def constant(self, value: Array) -> str:
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, *shape: int) -> str:
        return self.constant((self._rng.standard_normal(shape) * 0.4).astype(np.float32))

    def node(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> str:
        index = len(self._nodes)
        made = [f"t{index}" if not number else f"t{index}_{number}" for number in range(outputs)]
        self._nodes.append(helper.make_node(operator, list(inputs), made, name=f"{operator}_{index}", **attributes))
        self.at = made[0]
        return self.at

    def conv(self, out: int, *, source: str | None = None, groups: int = 1, kernel: int = 3) -> str:
        pad = kernel // 2
        weight, bias = self.weight(out, self.channels // groups, kernel, kernel), self.weight(out)
        self.channels = out
        return self.node("Conv", [source or self.at, weight, bias], pads=[pad] * 4, group=groups)

    def norm(self) -> str:
        vectors = [self.weight(self.channels) for _ in range(3)]
        spread = self.constant(self._rng.uniform(0.5, 2, self.channels).astype(np.float32))
        return self.node("BatchNormalization", [self.at, *vectors, spread])

    def finished(self, classes: int = 5) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "drawn",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [self._batch, 3, 8, 8])],
            [helper.make_tensor_value_info(self.at, TensorProto.FLOAT, [self._batch, classes])],
            self._constants,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _plain(net: Builder) -> None:
    net.conv(int(net._rng.integers(2, 9)))
    net.node("Relu", [net.at])


def _normed(net: Builder) -> None:
    net.conv(int(net._rng.integers(2, 9)), kernel=1)
    net.norm()
    net.node("Sigmoid", [net.at])


def _depthwise(net: Builder) -> None:
    net.conv(net.channels * int(net._rng.integers(1, 3)), groups=net.channels)
    net.node("Clip", [net.at, net.constant(np.float32(0)), net.constant(np.float32(6))])


def _grouped(net: Builder) -> None:
    net.conv(8)
    net.conv(4 * int(net._rng.integers(1, 4)), groups=int(net._rng.choice([2, 4])))


def _residual(net: Builder) -> None:
    start, channels = net.at, net.channels
    net.conv(int(net._rng.integers(2, 7)))
    net.node("Relu", [net.at])
    branch = net.conv(channels)
    net.node("Add", [branch, start])


def _two_branches(net: Builder) -> None:
    start, channels = net.at, net.channels
    left, wide = net.conv(int(net._rng.integers(2, 6))), net.channels
    net.channels = channels
    right = net.conv(int(net._rng.integers(2, 6)), source=start, kernel=1)
    net.node("Concat", [left, right, *([start] if net._rng.random() < 0.5 else [])], axis=1)
    net.channels += wide + (channels if len(net._nodes[-1].input) == 3 else 0)


def _split(net: Builder) -> None:
    net.conv(6)
    parts = net.constant(np.array([2, 4], np.int64))
    first = net.node("Split", [net.at, parts], 2, axis=1)
    net.channels = 4
    second = net.conv(3, source=f"{first}_1")
    net.node("Concat", [second, first], axis=1)
    net.channels = 5


def _sliced(net: Builder) -> None:
    net.conv(7)
    bounds = [net.constant(np.array([value], np.int64)) for value in (1, 6, 1)]
    net.node("Slice", [net.at, *bounds])
    net.channels = 5


def _turned(net: Builder) -> None:
    net.conv(int(net._rng.integers(2, 6)))
    net.node("Transpose", [net.at], perm=[0, 2, 3, 1])
    net.node("Mul", [net.at, net.weight(net.channels)])
    net.node("Transpose", [net.at], perm=[0, 3, 1, 2])


def _gated(net: Builder) -> None:
    """Squeeze and excitation."""
    net.conv(6)
    start = net.at
    net.node("GlobalAveragePool", [net.at])
    net.conv(2, kernel=1)
    net.node("Relu", [net.at])
    net.conv(6, kernel=1)
    net.node("Sigmoid", [net.at])
    net.node("Mul", [start, net.at])


def _padded(net: Builder) -> None:
    pads = np.array([0, 0, 1, 0, 0, 0, 0, 1], np.int64)
    net.node("Pad", [net.at, net.constant(pads)])
    net.node("MaxPool", [net.at], kernel_shape=[2, 2], strides=[1, 1])


def _shuffled(net: Builder) -> None:
    net.conv(6)
    size = net.size
    net.node("Reshape", [net.at, net.constant(np.array([0, 2, 3, size, size], np.int64))])
    net.node("Transpose", [net.at], perm=[0, 2, 1, 3, 4])
    net.node("Reshape", [net.at, net.constant(np.array([0, 6, size, size], np.int64))])


BLOCKS: dict[str, Callable[[Builder], None]] = {
    "plain": _plain, "normed": _normed, "depthwise": _depthwise, "grouped": _grouped, "residual": _residual,
    "branches": _two_branches, "split": _split, "sliced": _sliced, "turned": _turned, "gated": _gated,
    "padded": _padded, "shuffled": _shuffled,
}  # fmt: skip


def _flat(net: Builder) -> None:
    net.node("Flatten", [net.at])
    net.node("Gemm", [net.at, net.weight(net.channels * net.size**2, 6), net.weight(6)])
    net.node("Relu", [net.at])
    net.node("Gemm", [net.at, net.weight(5, 6), net.weight(1, 5)], transB=1)


def _flat_last(net: Builder) -> None:
    net.node("Transpose", [net.at], perm=[0, 2, 3, 1])
    net.node("Reshape", [net.at, net.constant(np.array([-1, net.channels * net.size**2], np.int64))])
    net.node("MatMul", [net.at, net.weight(net.channels * net.size**2, 5)])
    net.node("Softmax", [net.at], axis=-1)


def _averaged(net: Builder) -> None:
    net.node("ReduceMean", [net.at, net.constant(np.array([2, 3], np.int64))], keepdims=0)
    net.node("Gemm", [net.at, net.weight(net.channels, 5), net.weight(5)])


ENDS: dict[str, Callable[[Builder], None]] = {"flat": _flat, "flat_last": _flat_last, "averaged": _averaged}


def drawn(blocks: Sequence[str], end: str, seed: int, batch: int | str = "N") -> onnx.ModelProto:
    """A network of these blocks."""
    net = Builder(np.random.default_rng(seed), batch=batch)
    for block in blocks:
        BLOCKS[block](net)
    ENDS[end](net)
    return net.finished()

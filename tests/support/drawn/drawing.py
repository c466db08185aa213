"""A graph under construction: tensors with their shapes, nodes, constants."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]

OPSET = 17


@dataclass(frozen=True)
class Tensor:
    """One activation, its shape without the batch."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A model and its inputs' shapes; also a calibration of 96 samples.

    Attributes:
        ids: inputs that are indices → how many rows their table has.
    """

    seed: int
    model: onnx.ModelProto
    inputs: dict[str, tuple[int, ...]]
    ids: dict[str, int]
    samples: int = 96

    def feed(self, count: int, seed: int) -> dict[str, Array]:
        """Numbers between -1.7 and 1.7, so that fresh ones stay within what calibration saw; or indices."""
        rng = np.random.default_rng([self.seed, seed])
        made: dict[str, Array] = {}
        for name, shape in self.inputs.items():
            if name in self.ids:
                made[name] = rng.integers(0, self.ids[name], (count, *shape), dtype=np.int64)
            else:
                made[name] = rng.uniform(-1.7, 1.7, (count, *shape)).astype(np.float32)
        return made

    def __iter__(self) -> Iterator[dict[str, Array]]:
        every = self.feed(self.samples, 1)
        for row in range(self.samples):
            yield {name: array[row : row + 1] for name, array in every.items()}


class Drawing:
    """Nodes are put in by :meth:`put`; everything random comes of one generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.seed = seed
        self.tensors: list[Tensor] = []
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.ids: dict[str, int] = {}
        self.functions: list[onnx.FunctionProto] = []
        self._weights: dict[tuple[int, ...], list[str]] = {}
        # Names as exporters give them, and as quantizers do.
        self._style = self.pick(["t{}", "/model.{}/op", "x{}_scale", "w{}_quantized", "a b {}"], [6, 2, 1, 1, 0.3])
        self._count = 0

    def chance(self, share: float) -> bool:
        """Whether, in so many cases."""
        return bool(self.rng.random() < share)

    def pick(self, of: Sequence[Any], weights: Sequence[float] | None = None) -> Any:
        """One of these."""
        p = None if weights is None else np.asarray(weights, float) / np.sum(weights)
        return of[int(self.rng.choice(len(of), p=p))]

    def name(self) -> str:
        """A new one."""
        self._count += 1
        return str(self._style).format(self._count)

    def input(self, shape: tuple[int, ...], *, table: int = 0) -> Tensor:
        """A new input; of indices into a table where ``table`` says how long that is."""
        made = Tensor(self.name(), shape)
        self.inputs[made.name] = shape
        if table:
            self.ids[made.name] = table
        else:
            self.tensors.append(made)
        return made

    def constant(self, value: Any) -> str:
        """Stored, now and then by a Constant node."""
        name = self.name()
        stored = numpy_helper.from_array(np.asarray(value, order="C"), name)
        if self.chance(0.05):
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"constant {name}", value=stored))
        else:
            self.constants.append(stored)
        return name

    def weight(self, *shape: int, fan: int) -> str:
        """Of a layer that sums over ``fan`` products; shared, or stored as float16 or int8, now and then."""
        if shape in self._weights and self.chance(0.25):
            return str(self.pick(self._weights[shape]))
        value = (self.rng.standard_normal(shape) * self.rng.uniform(0.7, 1.4) / np.sqrt(fan)).astype(np.float32)
        if self.chance(0.05):
            value *= 10.0 ** self.rng.uniform(-1, 1, (shape[0], *[1] * (len(shape) - 1))).astype(np.float32)
        how = self.pick(["plain", "float16", "int8", "read back"], [30, 1, 1, 1])
        if how == "plain":
            name = self.constant(value)
        elif how == "float16":
            (name,) = self.raw("Cast", [self.constant(value.astype(np.float16))], to=TensorProto.FLOAT)
        else:
            step = np.float32(np.abs(value).max() / 127)
            codes = self.constant(np.round(value / step).astype(np.int8))
            if how == "read back":
                (name,) = self.raw("DequantizeLinear", [codes, self.constant(step)])
            else:
                (number,) = self.raw("Cast", [codes], to=TensorProto.FLOAT)
                (name,) = self.raw("Mul", [number, self.constant(step)])
        self._weights.setdefault(shape, []).append(name)
        return name

    def bias(self, size: int) -> str:
        """A vector, all 0 now and then."""
        return self.constant((self.rng.standard_normal(size) * self.pick([0.3, 0.0], [6, 1])).astype(np.float32))

    def raw(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> list[str]:
        """A node whose outputs nobody is offered; their names."""
        made = [self.name() for _ in range(outputs)]
        domain = {"domain": attributes.pop("domain")} if "domain" in attributes else {}
        name = "" if self.chance(0.1) else f"{operator} {made[0]}"
        self.nodes.append(helper.make_node(operator, list(inputs), made, name=name, **domain, **attributes))
        return made

    def put(self, operator: str, inputs: Sequence[Tensor | str], shape: tuple[int, ...], **attributes: Any) -> Tensor:
        """A node with one output, which others may take."""
        names = [one.name if isinstance(one, Tensor) else one for one in inputs]
        (name,) = self.raw(operator, names, **attributes)
        made = Tensor(name, shape)
        self.tensors.append(made)
        return made

    def of_rank(self, rank: int) -> list[Tensor]:
        """Tensors of so many axes beside the batch."""
        return [one for one in self.tensors if len(one.shape) == rank]

    def latest(self, rank: int) -> Tensor | None:
        """One of the last ones of a rank."""
        found = self.of_rank(rank)
        return found[-min(len(found), 1 + int(self.rng.geometric(0.7)) - 1 or 1)] if found else None

    def finish(self) -> Graph:
        """Outputs: everything that nobody reads, and a few that somebody does."""
        read = {name for node in self.nodes for name in node.input}
        read |= {
            name
            for node in self.nodes
            for attribute in node.attribute
            for inner in attribute.g.node
            for name in inner.input
        }
        made = [one for one in self.tensors if one.name not in self.inputs]
        chosen = [one for one in made if one.name not in read]
        chosen += [one for one in made if one.name in read and self.chance(0.06)]
        if self.chance(0.04):
            chosen += [one for one in self.tensors if one.name in self.inputs][:1]
        value = helper.make_tensor_value_info
        batch: int | str = 1 if self.functions == [] and any(node.op_type == "If" for node in self.nodes) else "N"
        inputs = [
            value(name, TensorProto.INT64 if name in self.ids else TensorProto.FLOAT, [batch, *shape])
            for name, shape in self.inputs.items()
        ]
        outputs = [value(one.name, TensorProto.FLOAT, [batch, *one.shape]) for one in chosen]
        graph = helper.make_graph(self.nodes, "drawn", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        if self.functions:
            opsets.append(helper.make_opsetid("own", 1))
        if self.chance(0.03):
            opsets.append(helper.make_opsetid("", OPSET))
        model = helper.make_model(graph, opset_imports=opsets, functions=self.functions, ir_version=8)
        return Graph(self.seed, model, self.inputs, self.ids)

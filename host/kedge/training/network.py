"""An ONNX graph as a PyTorch module: torch computes its nodes, its weights are parameters, and the trained values go
back into the same graph. Nothing is exported again, so names, layouts and operators stay as the user's exporter wrote
them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper

from kedge.training import operators, weights
from kedge.training.operators import Call, Kernel
from kedge.training.operators.logic import DTYPES
from kedge_protocol.errors import StepError

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor
Hook = Callable[[Tensor], Tensor]

_REMEDY = "Leave this step out of the recipe, or export the model without this operator"
_HALVES = (torch.float16, torch.bfloat16)
_FAILURES = (RuntimeError, IndexError, ValueError, TypeError, KeyError, NotImplementedError, AttributeError)


@dataclass(frozen=True)
class _Node:
    call: Call
    kernel: Kernel
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Network(torch.nn.Module):  # type: ignore[misc]
    """An ONNX graph that torch computes on the CPU.

    The weights and biases of layers, the factors and biases of normalizations, and the step sizes of quantizers
    (``Quant``, ``BipolarQuant``, ``QuantizeLinear``) are trained; see :mod:`kedge.training.weights`. Embeddings, the
    statistics of batch normalization and the scalars of formulas are not. Half floats are computed in float32.

    Args:
        model: its main graph is used; it is not changed.
        hooks: tensor name → function applied to the tensor before anything reads it (a simulated precision); for
            constants, inputs and results of nodes.

    Attributes:
        inputs, outputs: names, in the order of the graph.
        roles: trained constant → its role.

    Raises:
        StepError: there is no kernel for an operator; the error names the node.
    """

    def __init__(self, model: onnx.ModelProto, hooks: Mapping[str, Hook] | None = None) -> None:
        super().__init__()
        self.model = model
        stored = {name: _array(proto) for name, proto in _stored(model)}
        self.inputs = tuple(value.name for value in model.graph.input if value.name not in stored)
        self.outputs = tuple(value.name for value in model.graph.output)
        self.roles = weights.trainable_weights(model, stored)
        self._hooks = dict(hooks or {})
        self._types = {value.name: DTYPES.get(value.type.tensor_type.elem_type) for value in model.graph.output}
        self._keys = {name: f"t{index}" for index, name in enumerate(self.roles)}
        self._first: dict[str, Tensor] = {}
        self._fixed: dict[str, Tensor] = _small_constants(model)
        for name, array in stored.items():
            tensor = torch.tensor(array)
            if name not in self.roles:
                self._fixed[name] = self._hooked(name, tensor)
                continue
            if self.roles[name] is weights.Role.STEP:
                # Learnt as the logarithm of its change: steps stay positive, and one learning rate suits all sizes.
                self._first[name], tensor = tensor, torch.zeros_like(tensor)
            self.register_parameter(self._keys[name], torch.nn.Parameter(tensor))
        versions = {opset.domain: opset.version for opset in model.opset_import}
        versions[""] = versions.get("", versions.get("ai.onnx", 1))
        self._nodes = self._folded(
            [_understood(node, versions, model) for node in model.graph.node if node.op_type != "Constant"]
        )
        self._readers = Counter(name for node in self._nodes for name in node.inputs)

    def weight(self, name: str) -> Tensor:
        """Return the current value of a trained constant, as gradients see it."""
        value = self.get_parameter(self._keys[name])
        return self._first[name] * torch.exp(value) if name in self._first else value

    def forward(self, feeds: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """Return the outputs of the graph, in its order, and the tensors named in ``keep``.

        Args:
            feeds: input name → tensor of the input's shape; half floats are converted to float32.

        Raises:
            StepError: a node failed (the error names it and quotes torch), or there is no tensor of that name.
        """
        values = dict(self._fixed)
        for name in self.roles:
            values[name] = self._hooked(name, self.weight(name))
        for name in self.inputs:
            given = feeds[name]
            values[name] = self._hooked(name, given.float() if given.dtype in _HALVES else given)
        wanted = {*self.outputs, *keep}
        left = Counter(self._readers)
        for node in self._nodes:
            self._run(node, values)
            for name in node.inputs:
                left[name] -= 1
                if not left[name] and name not in wanted:
                    values.pop(name, None)  # nobody reads it again
        if missing := sorted(wanted - set(values)):
            raise StepError(f"the graph has no tensor {missing[0]!r}", remedy="Take the names from the graph's nodes")
        for name, kind in self._types.items():  # whole numbers of quantizers are carried as floats
            if kind is not None and not kind.is_floating_point and values[name].is_floating_point():
                values[name] = values[name].to(kind)
        return {name: values[name] for name in dict.fromkeys((*self.outputs, *keep))}

    def each(self, feeds: Mapping[str, Tensor], keep: Collection[str] = ()) -> dict[str, Tensor]:
        """Run :meth:`forward` for a graph whose batch is fixed to one, over many samples; the first axis is the
        sample."""

        def one(feed: dict[str, Tensor]) -> dict[str, Tensor]:
            return self.forward(feed, keep)

        rows = {name: feeds[name].unsqueeze(1) for name in self.inputs}
        try:
            made = torch.vmap(one)(rows)
        except StepError:  # something depends on values, sample by sample
            count = len(next(iter(rows.values())))
            singles = [one({name: row[index] for name, row in rows.items()}) for index in range(count)]
            made = {name: torch.stack([single[name] for single in singles]) for name in singles[0]}
        return {name: value.flatten(0, 1) if value.ndim > 1 else value for name, value in made.items()}

    def written(self) -> onnx.ModelProto:
        """Return the same graph with the trained constants, in their own types; nothing else is changed."""
        made = onnx.ModelProto()
        made.CopyFrom(self.model)
        for name, proto in _stored(made):
            if name in self.roles:
                kind = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
                values = self.weight(name).detach().numpy().astype(kind)
                if np.array_equal(values, numpy_helper.to_array(proto)):
                    continue
                fresh = numpy_helper.from_array(values, proto.name)
                fresh.doc_string = proto.doc_string
                proto.CopyFrom(fresh)
        return made

    def _hooked(self, name: str, value: Tensor) -> Tensor:
        return self._hooks[name](value) if name in self._hooks else value

    def _run(self, node: _Node, values: dict[str, Tensor]) -> None:
        try:
            made = node.kernel(node.call, [values[name] if name else None for name in node.inputs])
        except StepError:
            raise
        except _FAILURES as error:
            reason = " ".join(str(error).split())[:300]
            raise StepError(
                f"{node.call.operator} cannot be computed for training: {reason}",
                where=f"node {node.call.name!r}",
                remedy=_REMEDY,
            ) from error
        for name, value in zip(node.outputs, made if isinstance(made, tuple) else (made,), strict=False):
            if name:
                values[name] = self._hooked(name, value)

    def _folded(self, nodes: list[_Node]) -> list[_Node]:
        """Return the nodes that depend on an input or a trained constant; compute the others once, here."""
        left = []
        for node in nodes:
            if all(name in self._fixed for name in node.inputs if name) and any(node.inputs):
                self._run(node, self._fixed)
            else:
                left.append(node)
        return left


def tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    """Return samples as :class:`Network` takes them; copied, because memory-mapped files are read-only."""
    return {name: torch.tensor(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _stored(model: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield the tensors stored in the graph, with the names by which nodes read them."""
    if model.graph.sparse_initializer:
        raise StepError("the graph has sparse weights, they cannot be trained here", remedy="Export them dense")
    for proto in model.graph.initializer:
        yield proto.name, proto
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name == "value":
                    yield node.output[0], attribute.t


def _small_constants(model: onnx.ModelProto) -> dict[str, Tensor]:
    """Return the constants written as plain numbers."""
    found = {}
    for node in model.graph.node:
        if node.op_type == "Constant":
            for attribute in node.attribute:
                if attribute.name != "value":
                    value = onnx.helper.get_attribute_value(attribute)
                    if attribute.name not in ("value_float", "value_floats", "value_int", "value_ints"):
                        raise StepError(
                            f"a constant of kind {attribute.name} cannot be computed for training",
                            where=f"node {node.name!r}",
                            remedy=_REMEDY,
                        )
                    kind = torch.float32 if "float" in attribute.name else torch.int64
                    found[node.output[0]] = torch.tensor(value, dtype=kind)
    return found


def _array(proto: onnx.TensorProto) -> Array:
    """Return a stored tensor in a type that torch has: half floats as float32, 4-bit integers as int8."""
    array: Array = numpy_helper.to_array(proto)
    if proto.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        return array.astype(np.float32)
    if proto.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return array.astype(np.int8)
    if array.dtype.kind not in "fiub":
        raise StepError(
            f"holds {onnx.TensorProto.DataType.Name(proto.data_type)}, which torch cannot compute with",
            where=f"constant {proto.name!r}",
            remedy="Export the model with float weights",
        )
    return array


def _understood(node: onnx.NodeProto, versions: Mapping[str, int], model: onnx.ModelProto) -> _Node:
    domain = "" if node.domain == "ai.onnx" else node.domain
    kernel = operators.find(node.op_type, domain)
    if kernel is None or any(
        (function.domain, function.name) == (domain, node.op_type) for function in model.functions
    ):
        full = node.op_type if not domain else f"{domain}.{node.op_type}"
        raise StepError(f"operator {full} cannot be trained here", where=f"node {node.name!r}", remedy=_REMEDY)
    attributes = {attribute.name: _value(onnx.helper.get_attribute_value(attribute)) for attribute in node.attribute}
    call = Call(
        name=node.name,
        operator=node.op_type,
        opset=versions.get(domain, 1),
        attributes=attributes,
        outputs=len(node.output),
    )
    return _Node(call, kernel, tuple(node.input), tuple(node.output))


def _value(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return torch.tensor(_array(value))
    return value

"""Stores compressed weights in an ONNX file, dequantized by plain ONNX operators.

Codes lie in the file as uint8, two of 4 bits in a byte. Nodes before each layer look them up in their table and scale
them; they have nothing but constants for inputs, so that ONNX Runtime computes them once, as it loads the file, and
runs the layer in float as fast as ever. Of a table of embeddings only the rows that are asked for are read back, in
each call, so that it stays small in memory too.

A MatMul in ``int4`` becomes ONNX Runtime's own MatMulNBits (and a Gemm that and an Add), which reads the weights back
as it multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import dead_code, gptq, weight_encodings
from kedge_targets.graph.layers import layers
from kedge_targets.graph.names import Names
from kedge_targets.graph.weight_encodings import Encoded
from kedge_targets.numerics import Family, Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_NODES_BYTES = 900
"""Largest number of bytes of one dequantization's nodes in a file."""
_PAIRS = "kedge_pairs"
_CONTRIBUTED = "com.microsoft"
_BLOCKS = frozenset({16, 32, 64, 128, 256})
"""Group sizes of MatMulNBits."""


def store_weights(
    model: onnx.ModelProto,
    precisions: Mapping[str, Precision],
    *,
    group_size: int = 32,
    asymmetric: bool = True,
    seed: int = 0,
    contributed: bool = True,
    products: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """Return the graph with the weights of some layers compressed.

    Args:
        model: in opset 13 or newer, in which Slice and similar operators take their parameters as tensors; not changed.
        precisions: node name → precision; those of family ``weights`` count.
        group_size, asymmetric, seed: see :func:`kedge_targets.graph.weight_encodings.encode`.
        contributed: whether MatMulNBits may be used.
        products: of :func:`kedge_targets.graph.gptq.products`: the layers in it are rounded with it.

    A layer stays as it is where its weight is no initializer, or so small that nodes would cost what codes save.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    writer = _Writer(
        copy, group_size=group_size, asymmetric=asymmetric, seed=seed, contributed=contributed, products=products or {}
    )
    initializers = {tensor.name for tensor in copy.graph.initializer}
    for layer in layers(copy):
        precision = precisions.get(layer.name, Precision.FLOAT32)
        if precision.family is Family.WEIGHTS and layer.weight in initializers and layer.axis is not None:
            writer.store(layer.name, layer.weight_input, layer.axis, precision)
    writer.finish()
    dead_code.remove_dead_nodes(copy)
    return copy


class _Writer:
    """Writes codes and nodes into a model, in place."""

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        group_size: int,
        asymmetric: bool,
        seed: int,
        contributed: bool,
        products: Mapping[str, Array],
    ) -> None:
        self._model = model
        self._how: dict[str, Any] = {"group_size": group_size, "asymmetric": asymmetric, "seed": seed}
        self._asymmetric = asymmetric
        self._products = products
        self._nbits = contributed and group_size in _BLOCKS
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes = {node.name: node for node in model.graph.node}
        self._ranks = _ranks(model)
        self._names = Names(model)
        self._first: list[onnx.NodeProto] = []
        self._around: dict[str, tuple[list[onnx.NodeProto], list[onnx.NodeProto]]] = {}
        self._encoded: dict[tuple[str, Precision, int], Encoded] = {}
        self._expanded: dict[tuple[str, Precision, int], str] = {}
        self._halves = ""
        self._pairs: dict[str, str] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def store(self, name: str, weight_input: int, axis: int, precision: Precision) -> None:
        """Compress the weight of one node if that saves bytes."""
        from onnx import numpy_helper

        node = self._nodes[name]
        tensor = node.input[weight_input]
        weight = numpy_helper.to_array(self._initializers[tensor])
        if weight.dtype != np.float32:
            return
        key = (tensor, precision, axis % weight.ndim)
        if key not in self._encoded:
            product = self._products.get(name)
            self._encoded[key] = gptq.encode_weights(weight, precision, product, axis=key[2], **self._how)
        encoded = self._encoded[key]
        if encoded.stored_bytes + _NODES_BYTES >= weight.nbytes:
            return
        if node.op_type == "Gather" and weight.ndim == 2 and self._gathered(node, encoded, tensor):
            return
        if precision is Precision.INT4 and self._nbits and weight.ndim == 2 and self._multiplied(node, encoded, tensor):
            return
        if key not in self._expanded:
            self._expanded[key] = self._whole(encoded, tensor)
        node.input[weight_input] = self._expanded[key]

    def finish(self) -> None:
        """Insert the new nodes before and after those that use them."""
        old = list(self._model.graph.node)
        del self._model.graph.node[:]
        self._model.graph.node.extend(self._first)
        for node in old:
            before, behind = self._around.get(node.name, ([], []))
            self._model.graph.node.extend((*before, node, *behind))

    def _whole(self, encoded: Encoded, tensor: str) -> str:
        """Dequantize the whole weight; return the tensor's name."""
        make = _Nodes(self, tensor, self._first)
        shape = encoded.codes.shape
        if encoded.scales is None:
            return self._looked_up(make, encoded, encoded.codes)
        channels, length = shape[encoded.axis], encoded.codes.size // shape[encoded.axis]
        if not encoded.group_size:
            scales = encoded.scales.reshape([channels if axis == encoded.axis else 1 for axis in range(len(shape))])
            return make("Mul", self._looked_up(make, encoded, encoded.codes), self.constant(scales))
        groups = weight_encodings.to_groups(weight_encodings.to_rows(encoded.codes, encoded.axis), encoded.group_size)
        back = self._looked_up(make, encoded, groups)
        if encoded.zero_points is not None and self._asymmetric:
            zeros = make.pairs(encoded.zero_points, self._levels(encoded))
            back = make("Sub", back, make.reshaped(zeros, (*encoded.scales.shape, 1), of=encoded.scales.size))
        elif encoded.zero_points is not None:
            back = make("Sub", back, self.constant(np.array(8, np.float32)))
        back = make("Mul", back, make.single(self.constant(encoded.scales[..., None]), encoded.scales))
        back = make("Reshape", back, self.constant(np.array([channels, -1])))
        if groups.size > encoded.codes.size:
            ends = (self.constant(np.array([number])) for number in (0, length, 1))
            back = make("Slice", back, *ends)
        order = [encoded.axis, *(axis for axis in range(len(shape)) if axis != encoded.axis)]
        back = make("Reshape", back, self.constant(np.array([shape[axis] for axis in order])))
        if encoded.axis == 0:
            return back
        return make("Transpose", back, perm=[int(axis) for axis in np.argsort(order)])

    def _looked_up(self, make: _Nodes, encoded: Encoded, codes: Array) -> str:
        """Look up the values of codes, before zero-points and scales."""
        levels = self._levels(encoded)
        if encoded.precision.weight_bits == 8:
            return make("Gather", levels, make.integers(codes))
        return make.reshaped(make.pairs(codes, levels), codes.shape, of=codes.size)

    def _gathered(self, node: onnx.NodeProto, encoded: Encoded, tensor: str) -> bool:
        """Dequantize single rows of an embedding table; return False if the whole table is needed."""
        rows, length = encoded.codes.shape
        rank = self._ranks.get(node.input[1])
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        if rank is None or axis != 0 or encoded.axis != 0:
            return False
        four_bits = encoded.precision.weight_bits == 4
        if (four_bits and length % 2) or (encoded.group_size and length % encoded.group_size):
            return False
        before: list[onnx.NodeProto] = []
        make = _Nodes(self, node.name, before)
        asked, answer = node.input[1], node.output[0]
        levels = self._levels(encoded)

        def picked(array: Array) -> str:
            return make("Gather", self.constant(array), asked)

        def unpacked(array: Array, *shape: int) -> str:
            packed = weight_encodings.pack_codes(array).reshape(rows, -1)
            pairs = make("Gather", make.table_of_pairs(levels), make("Cast", picked(packed), to=_int32()))
            return make("Reshape", pairs, self.constant(np.array([0] * rank + list(shape))))

        if encoded.group_size and encoded.scales is not None:
            groups = encoded.scales.shape[1]
            back = unpacked(encoded.codes, groups, encoded.group_size)
            if encoded.zero_points is not None and self._asymmetric:
                even = np.pad(encoded.zero_points, ((0, 0), (0, groups % 2)))
                zeros = unpacked(even, even.shape[1], 1)
                if groups % 2:
                    zeros = make("Slice", zeros, *(self.constant(np.array([one])) for one in (0, groups, rank)))
                back = make("Sub", back, zeros)
            elif encoded.zero_points is not None:
                back = make("Sub", back, self.constant(np.array(8, np.float32)))
            back = make("Mul", back, make.single(picked(encoded.scales[..., None]), encoded.scales))
            back = make("Reshape", back, self.constant(np.array([0] * rank + [length])))
        else:
            if four_bits:
                back = unpacked(encoded.codes, length)
            else:
                back = make("Gather", levels, make("Cast", picked(encoded.codes), to=_int32()))
            if encoded.scales is not None:
                back = make("Mul", back, picked(encoded.scales))
        # The node itself becomes the last one and keeps its name.
        node.op_type = "Identity"
        del node.attribute[:]
        del node.input[:]
        node.input.append(back)
        node.output[0] = answer
        self._around[node.name] = (before, [])
        return True

    def _multiplied(self, node: onnx.NodeProto, encoded: Encoded, tensor: str) -> bool:
        """Replace MatMul or Gemm by MatMulNBits; return False for any other product."""
        import onnx
        from onnx import helper

        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] != tensor or not plain:
            return False
        if encoded.scales is None or encoded.zero_points is None:
            return False
        groups = weight_encodings.to_groups(weight_encodings.to_rows(encoded.codes, encoded.axis), encoded.group_size)
        channels = len(groups)
        name = self.fresh(f"{tensor}_stored")
        inputs = [
            node.input[0],
            self.constant(weight_encodings.pack_codes(groups).reshape(*groups.shape[:2], -1), name),
            self.constant(encoded.scales.reshape(-1), f"{name}_scales"),
        ]
        if self._asymmetric:
            even = np.pad(encoded.zero_points, ((0, 0), (0, groups.shape[1] % 2)))
            inputs.append(self.constant(weight_encodings.pack_codes(even), f"{name}_zeros"))
        bias = node.input[2] if len(node.input) > 2 else ""
        answer = node.output[0]
        made = helper.make_node(
            "MatMulNBits",
            inputs,
            [self.fresh(f"{answer}_product") if bias else answer],
            name=node.name,
            domain=_CONTRIBUTED,
            K=encoded.codes.size // channels,
            N=channels,
            bits=4,
            block_size=encoded.group_size,
        )
        behind = [helper.make_node("Add", [made.output[0], bias], [answer], name=f"{node.name}_bias")] if bias else []
        node.CopyFrom(made)
        self._around[node.name] = ([], behind)
        if all(opset.domain != _CONTRIBUTED for opset in self._model.opset_import):
            self._model.opset_import.append(onnx.helper.make_opsetid(_CONTRIBUTED, 1))
        return True

    def _levels(self, encoded: Encoded) -> str:
        """Return the value of each code, before zero-points and scales."""
        return self.constant(np.arange(16, dtype=np.float32) if encoded.table is None else encoded.table)

    def table_of_pairs(self, levels: str) -> str:
        """See :meth:`_Nodes.table_of_pairs`; made once per table."""
        if levels not in self._pairs:
            make = _Nodes(self, _PAIRS, self._first)
            if not self._halves:
                every = np.arange(256, dtype=np.uint8)
                self._halves = make.integers(np.stack((every & 15, every >> 4), axis=-1))
            self._pairs[levels] = make("Gather", levels, self._halves)
        return self._pairs[levels]

    def constant(self, array: Array, name: str = "") -> str:
        """Add an initializer; equal ones are stored once."""
        from onnx import numpy_helper

        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.fresh(name or f"kedge_constant_{len(self._constants)}")
            self._model.graph.initializer.append(
                numpy_helper.from_array(np.ascontiguousarray(array), self._constants[key])
            )
        return self._constants[key]

    def fresh(self, base: str) -> str:
        """Return an unused tensor name."""
        return self._names.fresh(base)


class _Nodes:
    """Makes the nodes for one weight.

    Args:
        writer: keeps the constants.
        base: of the names of nodes and tensors.
        into: where nodes are added.
    """

    def __init__(self, writer: _Writer, base: str, into: list[onnx.NodeProto]) -> None:
        self._writer = writer
        self._base = base
        self._into = into

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        from onnx import helper

        output = self._writer.fresh(f"{self._base}_{operator.lower()}")
        self._into.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def integers(self, codes: Array) -> str:
        """Convert codes to indices."""
        return self("Cast", self._writer.constant(codes, f"{self._base}_codes"), to=_int32())

    def single(self, scales: str, like: Array) -> str:
        """Convert scales to the layer's dtype; ``like`` is their stored form."""
        import onnx

        if like.dtype == np.float32:
            return scales
        return self("Cast", scales, to=int(onnx.TensorProto.FLOAT))

    def table_of_pairs(self, levels: str) -> str:
        """Return a 256 x 2 table: the values of the low and the high half of each byte."""
        return self._writer.table_of_pairs(levels)

    def pairs(self, codes: Array, levels: str) -> str:
        """Return the values of 4-bit codes, as bytes x 2."""
        return self("Gather", self.table_of_pairs(levels), self.integers(weight_encodings.pack_codes(codes)))

    def reshaped(self, pairs: str, shape: tuple[int, ...], *, of: int) -> str:
        """Reshape the first ``of`` values."""
        constant = self._writer.constant
        if of % 2:
            flat = self("Reshape", pairs, constant(np.array([-1])))
            pairs = self("Slice", flat, *(constant(np.array([number])) for number in (0, of)))
        return self("Reshape", pairs, constant(np.array(shape)))


def _int32() -> int:
    import onnx

    return int(onnx.TensorProto.INT32)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Return tensor → rank, if known."""
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    found = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in values
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape")
    }
    return found | {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}

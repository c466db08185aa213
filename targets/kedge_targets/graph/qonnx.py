"""Expands QONNX (ONNX with few-bit nodes) into plain operators that ONNX Runtime runs.

The arithmetic is that of the specification's operators IntQuant (formerly Quant), BipolarQuant, Trunc and
MultiThreshold (github.com/fastmachinelearning/qonnx, docs/qonnx-custom-ops), step by step in float32, so that the
results are the same number for number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError, UnsupportedOperatorError
from kedge_targets.graph import dead_code
from kedge_targets.graph.names import Names
from kedge_targets.graph.qonnx_nodes import DOMAIN, OPERATORS, is_ours, is_quantized, normalize
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

__all__ = ["DOMAIN", "OPERATORS", "expand_qonnx", "is_ours", "is_quantized", "normalize"]

Array = npt.NDArray[Any]

_OPSET = 13
"""Opset with GreaterOrEqual (12), and ReduceSum and Unsqueeze with axes as inputs."""


def expand_qonnx(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with QONNX nodes replaced by ONNX operators (opset 13 or newer) with the same float32 results.

    All other tensors keep their names; a model without such nodes comes back as a copy.

    Raises:
        UnsupportedOperatorError: a rounding mode, a bit width that is not constant, or a form of Trunc or
            MultiThreshold that is not known; names the node.
        ModelError: its opset cannot be brought up to 13.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    if not is_quantized(made):
        return made
    normalize(made)
    made = _brought_up(made)
    wiring = Wiring(made)
    builder = _Builder(made, wiring)
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        if is_ours(node):
            builder.begin(node)
            _EXPANSIONS[node.op_type](node, builder)
            nodes += builder.nodes
        else:
            nodes.append(node)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    kept = [opset for opset in made.opset_import if opset.domain != DOMAIN]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    dead_code.remove_dead_nodes(made)
    return made


def _brought_up(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnx

    have = max((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), default=0)
    if have >= _OPSET:
        return model
    try:
        return onnx.version_converter.convert_version(model, _OPSET)  # leaves nodes of other domains alone
    except Exception as error:  # the converter raises whatever its C++ half throws
        raise ModelError(
            f"opset {have} cannot be converted to {_OPSET}: {error}",
            where="graph with QONNX's nodes",
            remedy=f"Export the model with opset {_OPSET} or newer",
        ) from error


class _Builder:
    """Builds the nodes that replace one QONNX node."""

    def __init__(self, model: onnx.ModelProto, wiring: Wiring) -> None:
        self._model = model
        self._wiring = wiring
        self._names = Names(model)
        self._stored: dict[tuple[str, str, bytes], str] = {}
        self._ranks = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*model.graph.value_info, *model.graph.input, *model.graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        self.nodes: list[onnx.NodeProto] = []
        self._node: onnx.NodeProto | None = None

    def begin(self, node: onnx.NodeProto) -> None:
        """Start with the next node."""
        self._node, self.nodes = node, []

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        import onnx

        base = self._node.output[0] if self._node is not None else "expanded"
        made = output or self._names.fresh(f"{base}_{operator}")
        name = self._node.name if output and self._node is not None else made
        self.nodes.append(onnx.helper.make_node(operator, list(inputs), [made], name=name, **attributes))
        return made

    def number(self, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant; equal ones are stored once."""
        import onnx

        array = np.asarray(value, dtype=dtype, order="C")
        key = (str(array.dtype), str(array.shape), array.tobytes())
        if key not in self._stored:
            name = self._stored[key] = self._names.fresh(f"qonnx_{len(self._stored)}")
            self._model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
        return self._stored[key]

    def constant(self, index: int, what: str) -> Array:
        """Return the value of an input that must be constant."""
        node = self._now()
        value = self._wiring.constant(node.input[index]) if index < len(node.input) else None
        if value is None:
            raise self.refused(f"its {what} is not constant", "Export the model with a fixed one")
        return value

    def known(self, index: int) -> Array | None:
        """Return the value of an input; None if it is computed."""
        return self._wiring.constant(self._now().input[index])

    def rank(self, tensor: str) -> int:
        """Return the rank of a tensor."""
        value = self._wiring.constant(tensor)
        rank = value.ndim if value is not None else self._ranks.get(tensor)
        if rank is None:
            raise self.refused(f"the rank of its input {tensor!r} is not known", "Infer the graph's shapes first")
        return rank

    def attributes(self) -> dict[str, Any]:
        """Return the attributes of the node."""
        import onnx

        return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in self._now().attribute}

    def refused(self, what: str, remedy: str) -> UnsupportedOperatorError:
        """Return the error for a node that cannot be replaced."""
        node = self._now()
        return UnsupportedOperatorError(
            f"operator {node.op_type!r} of domain {node.domain!r}: {what}",
            where=f"node {node.name or node.output[0]!r}",
            remedy=remedy,
        )

    def _now(self) -> onnx.NodeProto:
        if self._node is None:
            raise ModelError("no node was begun")
        return self._node


def _quant(node: onnx.NodeProto, builder: _Builder) -> None:
    values, scale, zero = node.input[0], node.input[1], node.input[2]
    flags = builder.attributes()
    signed, narrow = bool(flags.get("signed", 1)), bool(flags.get("narrow", 0))
    bits = _bits(builder.constant(3, "bit width"), builder)
    shifted = _shift(builder.add("Div", values, scale), zero, builder, "Add")
    if bits == 1 and signed:
        rounded = _signs(shifted, builder)
    else:
        rounded = _round(_clip(shifted, bits, signed, narrow, builder), flags.get("rounding_mode", b"ROUND"), builder)
    builder.add("Mul", _shift(rounded, zero, builder, "Sub"), scale, output=node.output[0])


def _bipolar(node: onnx.NodeProto, builder: _Builder) -> None:
    values, scale = node.input[0], node.input[1]
    builder.add("Mul", _signs(builder.add("Div", values, scale), builder), scale, output=node.output[0])


def _trunc(node: onnx.NodeProto, builder: _Builder) -> None:
    """Version 1 (five inputs) shifts by the difference of the bit widths; version 2 by the ratio of the scales, and
    clips."""
    values, scale, zero = node.input[0], node.input[1], node.input[2]
    flags = builder.attributes()
    mode = flags.get("rounding_mode", b"FLOOR")
    whole = builder.add("Round", _shift(builder.add("Div", values, scale), zero, builder, "Add"))
    if len(node.input) == 5:
        before, after = builder.constant(3, "input bit width"), builder.constant(4, "output bit width")
        divisor = builder.number(2.0 ** (np.asarray(before, np.float64) - np.asarray(after, np.float64)))
        rounded = _round(builder.add("Div", whole, divisor), mode, builder)
        builder.add("Mul", _shift(rounded, zero, builder, "Sub"), scale, output=node.output[0])
        return
    if len(node.input) not in (6, 7):
        raise builder.refused(f"{len(node.input)} inputs are of no version known", "Export it with version 1 or 2")
    first, second = builder.constant(1, "scale"), builder.constant(4, "output scale")
    power = np.float32(2) ** np.round(np.log2(second / first)).astype(np.float32)
    bits = _bits(builder.constant(len(node.input) - 1, "output bit width"), builder)
    clipped = _clip(
        builder.add("Div", whole, builder.number(power)),
        bits,
        bool(flags.get("signed", 1)),
        bool(flags.get("narrow", 0)),
        builder,
    )
    middle = builder.number(np.asarray(builder.constant(2, "zero-point"), np.float32) / power)
    moved = builder.add("Sub", _round(clipped, mode, builder), middle)
    builder.add("Mul", moved, node.input[4], output=node.output[0])


def _multithreshold(node: onnx.NodeProto, builder: _Builder) -> None:
    """Count the thresholds that each value reaches, times out_scale plus out_bias."""
    import onnx

    flags = builder.attributes()
    thresholds = builder.constant(1, "table of thresholds").astype(np.float32)
    rank = builder.rank(node.input[0])
    layout = flags.get("data_layout", b"NCHW").decode()
    # Channels first in two or four axes of NCHW; all else has them last.
    axis = 1 if rank == 2 or (rank == 4 and layout == "NCHW") else rank - 1
    shape = [1] * (rank + 1)
    shape[axis], shape[-1] = thresholds.shape
    wider = builder.add("Unsqueeze", node.input[0], builder.number([rank], np.int64))
    reached = builder.add("GreaterOrEqual", wider, builder.number(thresholds.reshape(shape)))
    counted = builder.add("Cast", reached, to=onnx.TensorProto.FLOAT)
    total = builder.add("ReduceSum", counted, builder.number([rank], np.int64), keepdims=0)
    scaled = builder.add("Mul", total, builder.number(flags.get("out_scale", 1.0)))
    builder.add("Add", scaled, builder.number(flags.get("out_bias", 0.0)), output=node.output[0])


_EXPANSIONS: dict[str, Callable[[Any, _Builder], None]] = {
    "Quant": _quant,
    "IntQuant": _quant,
    "BipolarQuant": _bipolar,
    "Trunc": _trunc,
    "MultiThreshold": _multithreshold,
}


def _bits(value: Array, builder: _Builder) -> float:
    if value.size != 1 or float(value.reshape(())) < 1:
        raise builder.refused(f"its bit width is {value.tolist()}", "Give one number, 1 or more")
    return float(value.reshape(()))


def _shift(values: str, zero: str, builder: _Builder, operator: str) -> str:
    """Add or subtract the zero-point unless it is 0."""
    node_inputs = builder.known(2)
    if node_inputs is not None and not np.any(node_inputs):
        return values
    return builder.add(operator, values, zero)


def _clip(values: str, bits: float, signed: bool, narrow: bool, builder: _Builder) -> str:
    if signed:
        low, high = -(2.0 ** (bits - 1)) + float(narrow), 2.0 ** (bits - 1) - 1
    else:
        low, high = 0.0, 2.0**bits - 1 - float(narrow)
    return builder.add("Clip", values, builder.number(low), builder.number(high))


def _signs(values: str, builder: _Builder) -> str:
    reached = builder.add("GreaterOrEqual", values, builder.number(0.0))
    return builder.add("Where", reached, builder.number(1.0), builder.number(-1.0))


def _round(values: str, mode: bytes | str, builder: _Builder) -> str:
    name = (mode.decode() if isinstance(mode, bytes) else mode).upper()
    if name in ("ROUND", "HALF_EVEN"):
        return builder.add("Round", values)
    if name in ("CEIL", "FLOOR"):
        return builder.add("Ceil" if name == "CEIL" else "Floor", values)
    if name not in ("UP", "DOWN", "ROUND_TO_ZERO", "HALF_UP", "HALF_DOWN"):
        raise builder.refused(f"its rounding mode {name!r} is not known", "Export it with ROUND, CEIL or FLOOR")
    # By magnitude, the sign put back.
    size = builder.add("Abs", values)
    if name.startswith("HALF"):
        size = builder.add("Add" if name == "HALF_UP" else "Sub", size, builder.number(0.5))
    size = builder.add("Ceil" if name in ("UP", "HALF_DOWN") else "Floor", size)
    return builder.add("Mul", builder.add("Sign", values), size)

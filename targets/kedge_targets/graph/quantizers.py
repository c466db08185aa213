"""Decides where a plan places quantizers and how wide they are, as plain data for observing ranges and inserting
nodes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import attention, layers, rounding
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Family, Granularity, Plan, Precision, QuantizationScheme

if TYPE_CHECKING:
    import onnx

_OBSERVED = (Family.FABRIC, Family.STATIC)
_CARRIED = (Family.FABRIC, Family.STATIC, Family.DYNAMIC)


@dataclass(frozen=True, kw_only=True)
class Style:
    """The integer format of a backend.

    Attributes:
        per_channel: each output channel of a weight has its own scale.
        weight_method: ``max`` or ``mse``, see :func:`kedge_targets.graph.rounding.weight_scales`.
        reduced_range: weights of 8 bits use 7.
        signed: activations are signed integers (with a zero-point, unless ``symmetric``).
        symmetric: the zero-point is fixed at the middle.
        unsigned_after_relu: activations that cannot be negative are unsigned with zero-point 0, all others signed and
            symmetric; over ``signed`` and ``symmetric``.
        at_source: an activation is quantized where it arises (after the Relu, at the graph's input), before what only
            moves values (MaxPool, Flatten, Transpose), and all its readers take it so; else just at the layer's input.
        relus: the output of every Relu whose next layers are quantized, whatever reads it first (a pooling).
        input_bits: of the graph's input, and of what is computed of it before the first layer; None for the layer's.
        residuals: both branches of an Add are quantized, and what comes out (after a Relu, where one follows).
        shared_scales: the branches of an Add share one scale.
        products: products of two activations (attention) are quantized as the plan says; else those alone that it
            names (on programmable logic none).
        beyond: ranges reach as far as more samples would (:mod:`kedge_targets.graph.unseen_ends`).
    """

    per_channel: bool = True
    weight_method: str = "max"
    reduced_range: bool = False
    signed: bool = False
    symmetric: bool = False
    unsigned_after_relu: bool = False
    at_source: bool = False
    relus: bool = True
    input_bits: int | None = None
    residuals: bool = True
    shared_scales: bool = False
    products: bool = True
    beyond: bool = False


FABRIC = Style(
    weight_method="mse",
    unsigned_after_relu=True,
    at_source=True,
    input_bits=8,
    shared_scales=True,
    products=False,
)
"""Style of FPGA logic as FINN builds it: few bits, no zero-points, before thresholds."""


def style_of(plan: Plan) -> Style:
    """The style that a plan implies: :data:`FABRIC` for that family, else after :attr:`Plan.quantized` (per-channel
    weights and asymmetric uint8 activations where it says nothing)."""
    if any(precision.family is Family.FABRIC for precision in plan.precisions):
        return FABRIC
    return Style() if plan.scheme is None else style_for(plan.scheme, guard=plan.guard)


def style_for(quantized: QuantizationScheme, *, guard: bool = False) -> Style:
    """Return the style of an int8 scheme, with or without :attr:`Plan.guard`."""
    return Style(
        per_channel=quantized.granularity is Granularity.PER_CHANNEL,
        reduced_range=quantized.reduced_range,
        products=quantized.products,
        signed=quantized.activation == "int8",
        symmetric=quantized.symmetric_activation,
        beyond=quantized.reaches_further(guard=guard),
    )


@dataclass(kw_only=True)
class Quantizer:
    """One quantizer of an activation.

    Attributes:
        tensor: that it quantizes.
        bits: the widest of its readers'.
        unsigned: zero-point 0, no negative values; None where only the range can tell (a graph's input: unsigned where
            its range begins at 0).
        symmetric: zero-point at the middle.
        signed: integers of a quantizer with a zero-point.
        dynamic: the range is found in each call, for each sample.
        readers: (node, index of its input) that take the quantized values; None for all.
        group: quantizers of one group share a scale.
    """

    tensor: str
    bits: int
    unsigned: bool | None = False
    symmetric: bool = False
    signed: bool = False
    dynamic: bool = False
    readers: set[tuple[str, int]] | None = None
    group: str | None = None

    @property
    def narrow(self) -> bool:
        """Whether signed integers omit the lowest value, so that they are symmetric."""
        return self.symmetric or self.unsigned is None


def precision_of(name: str, plan: Plan) -> Precision:
    """Return the plan's precision of a node."""
    return plan.layers.get(name, plan.default)


def place(model: onnx.ModelProto, plan: Plan, *, style: Style) -> list[Quantizer]:
    """Return every activation quantizer, in the order in which the tensors are produced.

    Raises:
        LoweringError: the plan names a node that the graph has not.
    """
    names = {node.name for node in model.graph.node}
    if unknown := sorted(set(plan.layers) - names):
        raise LoweringError(
            "the plan names a layer that the graph has not",
            where=f"node {unknown[0]!r}",
            remedy="Take the names from the graph's nodes",
        )
    placing = _Placing(model, plan, style)
    placing.at_layers()
    if style.relus:
        placing.at_relus()
    if style.residuals:
        placing.at_residuals()
    return placing.ordered()


def tensors(model: onnx.ModelProto, plan: Plan, *, style: Style | None = None) -> list[str]:
    """Return the names of the tensors whose ranges must be observed for this plan."""
    placed = place(model, plan, style=style or style_of(plan))
    return list(dict.fromkeys(quantizer.tensor for quantizer in placed if not quantizer.dynamic))


def observing(model: onnx.ModelProto, plan: Plan, *, style: Style | None = None) -> Mapping[str, tuple[int, bool]]:
    """Tensor → (bits, whether its range is symmetric): what :func:`kedge_targets.graph.ranges.observe` wants to know
    of each of :func:`tensors`."""
    placed = place(model, plan, style=style or style_of(plan))
    return {
        quantizer.tensor: (quantizer.bits, quantizer.symmetric and not quantizer.unsigned)
        for quantizer in placed
        if not quantizer.dynamic
    }


def integers_of(one: Quantizer, found: Mapping[str, tuple[float, float]]) -> tuple[float, int, bool]:
    """Return scale, zero-point and signedness for the tensor's range.

    Raises:
        LoweringError: there is no range.
    """
    if one.tensor not in found:
        raise LoweringError(
            "there is no range for it",
            where=f"tensor {one.tensor!r}",
            remedy="Observe all of fakequant.tensors(model, plan)",
        )
    low, high = found[one.tensor]
    if one.unsigned or (one.unsigned is None and low >= 0):
        return *rounding.scale_and_zero_point(0.0, high, bits=one.bits, signed=False, symmetric=False), False
    symmetric = one.symmetric or one.unsigned is None
    scale, zero = rounding.scale_and_zero_point(low, high, bits=one.bits, signed=one.signed, symmetric=symmetric)
    return scale, zero, one.signed


def weight_of(layer: layers.Layer, precision: Precision, style: Style) -> tuple[int, int | None] | None:
    """Return the bits and the scale axis of a layer's weight; None if it stays float."""
    if layer.weight is None or precision.family not in _CARRIED:
        return None
    if layer.operator == "Gather":
        # A table of embeddings has a row for each word, and runtimes give it one scale; logic does not look up words.
        return None if precision.family is Family.FABRIC else (precision.weight_bits, None)
    bits = precision.weight_bits - int(style.reduced_range and precision.weight_bits == 8)
    return bits, layer.axis if style.per_channel else None


class _Placing:
    def __init__(self, model: onnx.ModelProto, plan: Plan, style: Style) -> None:
        self._model = model
        self._plan = plan
        self._style = style
        self._wiring = Wiring(model)
        self._layers = {layer.name: layer for layer in layers.layers(model, self._wiring)}
        self._made: dict[tuple[str, int, bool], Quantizer] = {}

    def ordered(self) -> list[Quantizer]:
        order = {value.name: -1 for value in self._model.graph.input}
        order |= {tensor: index for index, node in enumerate(self._model.graph.node) for tensor in node.output}
        return sorted(self._made.values(), key=lambda quantizer: (order.get(quantizer.tensor, -1), -quantizer.bits))

    def at_layers(self) -> None:
        for layer in self._layers.values():
            precision = precision_of(layer.name, self._plan)
            if precision.activation_bits is None or precision.family not in _CARRIED:
                continue
            named = layer.name in self._plan.layers and precision.family is not Family.FABRIC
            if layer.weight is None and not self._style.products and not named:
                continue
            dynamic = precision.family is Family.DYNAMIC
            for tensor, index in zip(layer.activations, layer.activation_inputs, strict=True):
                self._add(tensor, precision.activation_bits, (layer.name, index), dynamic=dynamic)

    def at_relus(self) -> None:
        for node in self._model.graph.node:
            if node.op_type == "Relu":
                bits = self._bits_behind(node.output[0])
                if bits is not None:
                    self._add(node.output[0], bits, None)

    def at_residuals(self) -> None:
        # Scores and masks are nobody's residual.
        scores = set(attention.before_softmax(self._model))
        for node in self._model.graph.node:
            if node.op_type != "Add" or node.name in scores:
                continue
            if any(self._wiring.constant(tensor) is not None for tensor in node.input):
                continue
            precision = precision_of(node.name, self._plan)
            if precision.family not in _OBSERVED or precision.activation_bits is None:
                continue
            if not any(layer.weight is not None for layer in self._upstream(node)):
                continue
            bits = self._bits_behind(node.output[0]) or precision.activation_bits
            branches = [self._add(tensor, bits, (node.name, index)) for index, tensor in enumerate(node.input)]
            after = [reader for reader, _ in self._wiring.readers[node.output[0]]]
            if [reader.op_type for reader in after] == ["Relu"]:
                self._add(after[0].output[0], bits, None)
            elif node.output[0] not in self._wiring.outputs:
                self._add(node.output[0], bits, None)
            if self._style.shared_scales:
                self._share(branches)

    def _share(self, branches: list[Quantizer]) -> None:
        groups = {branch.group for branch in branches} - {None}
        name = min(group for group in groups if group is not None) if groups else branches[0].tensor
        for quantizer in self._made.values():
            if quantizer in branches or (quantizer.group is not None and quantizer.group in groups):
                quantizer.group = name

    def _upstream(self, node: onnx.NodeProto) -> Iterable[layers.Layer]:
        for tensor in node.input:
            yield from self._layers_before(tensor)

    def _layers_before(self, tensor: str) -> Iterable[layers.Layer]:
        return (self._layers[node.name] for node in self._wiring.behind(tensor) if node.name in self._layers)

    def _add(self, tensor: str, bits: int, reader: tuple[str, int] | None, *, dynamic: bool = False) -> Quantizer:
        style = self._style
        if style.at_source:
            tensor, reader = self._wiring.source(tensor), None
        given = style.input_bits is not None and next(iter(self._layers_before(tensor)), None) is None
        if given and style.input_bits is not None:
            bits = style.input_bits
        # Where all readers take the same, one quantizer stands there, and the widest reader decides.
        key = (tensor, 0 if style.at_source else bits, dynamic)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = self._quantizer(tensor, bits, dynamic=dynamic, given=given)
        made.bits = max(made.bits, bits)
        if reader is None:
            made.readers = None
        elif made.readers is not None:
            made.readers.add(reader)
        return made

    def _quantizer(self, tensor: str, bits: int, *, dynamic: bool, given: bool) -> Quantizer:
        style = self._style
        readers: set[tuple[str, int]] = set()
        if not style.unsigned_after_relu:
            return Quantizer(
                tensor=tensor, bits=bits, symmetric=style.symmetric, signed=style.signed, dynamic=dynamic,
                readers=readers,
            )  # fmt: skip
        unsigned: bool | None = self._wiring.never_negative(tensor)
        if not unsigned and given:
            unsigned = None
        return Quantizer(
            tensor=tensor, bits=bits, unsigned=unsigned, symmetric=unsigned is False, signed=True, readers=readers
        )

    def _bits_behind(self, tensor: str) -> int | None:
        """The bits of the layers that take this tensor next, the widest; the default's where none does; None where
        they are not integers in observed ranges."""
        pending, seen = [tensor], {tensor}
        met, found = False, [0]
        while pending:
            for reader, _ in self._wiring.readers[pending.pop()]:
                if reader.name in self._layers:
                    met = True
                    precision = precision_of(reader.name, self._plan)
                    found.append((precision.activation_bits or 0) if precision.family in _OBSERVED else 0)
                    continue
                fresh = set(reader.output) - seen
                seen |= fresh
                pending += fresh
        if not met and self._plan.default.family in _OBSERVED:
            return self._plan.default.activation_bits
        return max(found) or None

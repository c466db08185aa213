"""Simulates quantization in a float graph by inserting QONNX ``Quant`` nodes, and removes them again.

A ``Quant`` node rounds its input to integers of a scale and gives them back as float, so that the graph still computes
with real numbers, but only with those that the device has (A. Pappalardo et al., "QONNX: Representing
Arbitrary-Precision Quantized Neural Networks", 2022). ONNX Runtime runs the graph after
:func:`kedge_targets.graph.qonnx.expand_qonnx`.

The usual way::

    ranges = fakequant.calibrated(model, plan, samples)
    simulated = fakequant.inserted(model, plan, ranges)
    ...
    trained, learnt = fakequant.removed(simulated)

Only layers of the families ``fabric``, ``static`` and ``dynamic`` are touched. Weights that are stored small (family
``weights``) are simulated by :mod:`kedge_targets.graph.weight_encodings`, offline. Biases stay float: with the 32 bits
that runtimes give them they lose nothing that could be seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import dead_code, layers, quantizers, ranges, rounding, topological_order
from kedge_targets.graph.names import Names
from kedge_targets.graph.qonnx_nodes import DOMAIN, VERSION
from kedge_targets.graph.quantizers import FABRIC, Quantizer, Style, style_for, style_of, tensors
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Plan

if TYPE_CHECKING:
    import onnx

__all__ = [
    "DOMAIN",
    "FABRIC",
    "Style",
    "calibrate",
    "insert_quantizers",
    "remove_quantizers",
    "style_for",
    "style_of",
    "tensors",
]

Array = npt.NDArray[Any]

QUANT = "Quant"
_SUFFIX = "_quant"


def calibrate(
    model: onnx.ModelProto,
    plan: Plan,
    samples: Iterable[Mapping[str, Array]],
    *,
    style: Style | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the ranges for :func:`insert_quantizers`: the plan's own, the others observed with the plan's method.

    Args:
        samples: see :func:`kedge_targets.graph.ranges.observe`; not read where nothing is to be observed.
        style: of the backend, with how far its ranges reach; :func:`style_of` the plan if not given.

    Raises:
        See :func:`kedge_targets.graph.ranges.observe` and :func:`kedge_targets.graph.quantizers.place`.
    """
    chosen = style or style_of(plan)
    wanted = quantizers.observing(model, plan, style=chosen)
    given = {name: plan.ranges[name] for name in wanted if name in plan.ranges}
    missing = [name for name in wanted if name not in given]
    if not missing:
        return given
    return given | ranges.observe(
        model,
        samples,
        missing,
        method=plan.range_method,
        percentile=plan.percentile,
        bits={name: wanted[name][0] for name in missing},
        symmetric=[name for name in missing if wanted[name][1]],
        beyond=chosen.beyond,
        progress=progress,
    )


def insert_quantizers(
    model: onnx.ModelProto,
    plan: Plan,
    found: Mapping[str, tuple[float, float]],
    *,
    style: Style | None = None,
) -> onnx.ModelProto:
    """Return the graph with ``Quant`` nodes before weights and activations as planned.

    A weight's node takes the weight itself (an initializer of its own name, so that it can be trained), a constant
    scale of the weight's rank (one for each output channel), zero-point 0 and its bits. An activation's node takes
    constant scalars, its scale an initializer of its own (``NAME_scale``; those that must be equal share one);
    for ``int8-dynamic`` scale and zero-point are computed in the graph, of each sample's own range.

    Args:
        model: a float graph whose nodes have names; not changed.
        found: tensor → (low, high), see :func:`calibrated`; those that nothing needs are left out.
        style: of the backend; :func:`style_of` the plan if not given.

    Returns:
        A new model; its tensors keep their names, quantized ones are called ``NAME_quant``.

    Raises:
        LoweringError: a tensor without a range, or the plan names a node that the graph has not.
    """
    import onnx

    chosen = style or style_of(plan)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    inserting = _Inserting(made, plan, chosen)
    inserting.weights()
    inserting.activations(quantizers.place(model, plan, style=chosen), found)
    inserting.finish()
    return made


class _Inserting:
    def __init__(self, model: onnx.ModelProto, plan: Plan, style: Style) -> None:
        self._model = model
        self._plan = plan
        self._style = style
        self._wiring = Wiring(model)
        self._nodes = {node.name: node for node in model.graph.node}
        self._names = Names(model)
        self._new: list[onnx.NodeProto] = []
        self._shared: dict[tuple[str, str], str] = {}
        self._types = {value.name: value for value in (*model.graph.value_info, *model.graph.input)}

    def weights(self) -> None:
        made: dict[tuple[str, int, int | None], str] = {}
        for layer in layers.layers(self._model, self._wiring):
            how = quantizers.weight_of(layer, quantizers.precision_of(layer.name, self._plan), self._style)
            if how is None or layer.weight is None:
                continue
            bits, axis = how
            key = (layer.weight, bits, axis)
            if key not in made:
                made[key] = self._weight(layer.weight, bits, axis)
            self._nodes[layer.name].input[layer.weight_input] = made[key]

    def _weight(self, weight: str, bits: int, axis: int | None) -> str:
        value = self._wiring.constant(weight)
        if value is None:
            raise LoweringError(
                "its weight is quantized already, by a QONNX node",
                where=f"tensor {weight!r}",
                remedy="Give such a graph as it is, or take the nodes out first",
            )
        scales = rounding.weight_scales(value, bits=bits, axis=axis, method=self._style.weight_method)
        scale = self._constant(f"{weight}_scale", rounding.broadcast_along(scales, value.ndim, axis))
        return self._quant(weight, scale, self._number(0.0), bits, signed=True, narrow=True)

    def activations(self, placed: list[Quantizer], found: Mapping[str, tuple[float, float]]) -> None:
        settings = {id(one): quantizers.integers_of(one, found) for one in placed if not one.dynamic}
        for group in {one.group for one in placed} - {None}:
            members = [settings[id(one)] for one in placed if one.group == group]
            widest = max(scale for scale, _, _ in members)
            for one in placed:
                if one.group == group:
                    _, zero, signed = settings[id(one)]
                    settings[id(one)] = (widest, zero, signed)
        shared: dict[str, str] = {}
        for one in placed:
            if one.dynamic:
                output = self._quant(one.tensor, *self._dynamic(one), one.bits, signed=False, narrow=False)
            else:
                step, middle, signed = settings[id(one)]
                # Training moves a scale: only those of one group are one.
                scale = shared.get(one.group or "") or self._constant(f"{one.tensor}_scale", np.float32(step))
                shared |= {one.group: scale} if one.group else {}
                output = self._quant(
                    one.tensor,
                    scale,
                    self._number(float(middle)),
                    one.bits,
                    signed=signed,
                    narrow=signed and one.narrow,
                )
            self._rewire(one, output)

    def _rewire(self, one: Quantizer, output: str) -> None:
        for node in self._model.graph.node:
            for index, tensor in enumerate(node.input):
                if tensor == one.tensor and (one.readers is None or (node.name, index) in one.readers):
                    node.input[index] = output

    def _dynamic(self, one: Quantizer) -> tuple[str, str]:
        """Add nodes that compute scale and zero-point from each sample's own range, as DynamicQuantizeLinear does for a
        whole tensor: scale = (max - min) / 255 with 0 in the range, zero-point = round(-min / scale)."""
        import onnx

        value = self._types.get(one.tensor)
        rank = len(value.type.tensor_type.shape.dim) if value is not None else 0
        if rank < 2:
            raise LoweringError(
                "its rank is not known, or it has no axis beside the batch",
                where=f"tensor {one.tensor!r}",
                remedy="Infer the shapes of the graph first",
            )
        node = onnx.helper.make_node
        base, zero = one.tensor, self._number(0.0)
        ends: dict[str, str] = {}
        reduce_by_input = self._opset() >= 18
        for end, reduce, pick in (("min", "ReduceMin", "Min"), ("max", "ReduceMax", "Max")):
            reached, ends[end] = self._names.fresh(f"{base}_{reduce}"), self._names.fresh(f"{base}_{end}")
            axes = list(range(1, rank))
            if reduce_by_input:
                axes_name = self._constant(f"{base}_axes", np.array(axes, dtype=np.int64))
                self._new.append(node(reduce, [base, axes_name], [reached], name=reached, keepdims=1))
            else:
                self._new.append(node(reduce, [base], [reached], name=reached, keepdims=1, axes=axes))
            self._new.append(node(pick, [reached, zero], [ends[end]], name=ends[end]))
        width, step, scale = (self._names.fresh(f"{base}_{part}") for part in ("width", "step", "dynamic_scale"))
        low, quotient, zero_point = (
            self._names.fresh(f"{base}_{part}") for part in ("low", "quotient", "dynamic_zero")
        )
        levels = self._number(float(2**one.bits - 1))
        self._new += [
            node("Sub", [ends["max"], ends["min"]], [width], name=width),
            node("Div", [width, levels], [step], name=step),
            # A sample of zeros alone has no range.
            node("Max", [step, self._number(float(np.finfo(np.float32).tiny))], [scale], name=scale),
            node("Neg", [ends["min"]], [low], name=low),
            node("Div", [low, scale], [quotient], name=quotient),
            node("Round", [quotient], [zero_point], name=zero_point),
        ]
        return scale, zero_point

    def _opset(self) -> int:
        return max(int(opset.version) for opset in self._model.opset_import if opset.domain in ("", "ai.onnx"))

    def _quant(self, tensor: str, scale: str, zero: str, bits: int, *, signed: bool, narrow: bool) -> str:
        import onnx

        output = self._names.fresh(f"{tensor}{_SUFFIX}")
        self._new.append(
            onnx.helper.make_node(
                QUANT,
                [tensor, scale, zero, self._number(float(bits))],
                [output],
                name=output,
                domain=DOMAIN,
                signed=int(signed),
                narrow=int(narrow),
                rounding_mode="ROUND",
            )
        )
        if tensor in self._types:
            value = self._model.graph.value_info.add()
            value.CopyFrom(self._types[tensor])
            value.name = output
        return output

    def _number(self, value: float) -> str:
        """Add a scalar; equal ones are stored once."""
        key = ("number", np.float32(value).tobytes().hex())
        if key not in self._shared:
            self._shared[key] = self._store(self._names.fresh(f"number_{value:g}"), np.array(value, dtype=np.float32))
        return self._shared[key]

    def _constant(self, name: str, value: Any) -> str:
        return self._store(self._names.fresh(name), value)

    def _store(self, name: str, value: Any) -> str:
        import onnx

        self._model.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def finish(self) -> None:
        """Insert the new nodes in topological order."""
        import onnx

        nodes = topological_order.sort_nodes([*self._model.graph.node, *self._new])
        del self._model.graph.node[:]
        self._model.graph.node.extend(nodes)
        if all(opset.domain != DOMAIN for opset in self._model.opset_import):
            self._model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))


def remove_quantizers(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, tuple[float, float]]]:
    """Return the graph without its ``Quant`` nodes, as a float graph to lower.

    Weights are then the float ones that the nodes took; scale and zero-point of an activation become the range that
    its integers covered. ``BipolarQuant`` and ``Trunc`` have no float form and stay.

    Args:
        model: of :func:`inserted`, perhaps with weights and scales that were trained since; not changed.

    Returns:
        The graph, and tensor → (low, high) of the activations.
    """
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    wiring = Wiring(made)
    learnt: dict[str, tuple[float, float]] = {}
    gone: dict[str, str] = {}
    for node in made.graph.node:
        if node.op_type not in ("Quant", "IntQuant"):
            continue
        gone[node.output[0]] = node.input[0]
        covered = None if wiring.constant(node.input[0]) is not None else _covered(node, wiring)
        if covered is not None:
            low, high = learnt.get(node.input[0], covered)
            learnt[node.input[0]] = (min(low, covered[0]), max(high, covered[1]))
    for node in made.graph.node:
        for index, tensor in enumerate(node.input):
            source = tensor
            while source in gone:
                source = gone[source]
            node.input[index] = source
    for value in made.graph.output:
        if value.name in gone:
            _pass_on(made, value.name)
    dead_code.remove_dead_nodes(made)
    kept = [opset for opset in made.opset_import if opset.domain != DOMAIN or _uses(made)]
    del made.opset_import[:]
    made.opset_import.extend(kept)
    return made, learnt


def _covered(node: onnx.NodeProto, wiring: Wiring) -> tuple[float, float] | None:
    """Return the range that an activation's integers cover; None if it changes from call to call."""
    numbers = [wiring.constant(tensor) for tensor in node.input[1:4]]
    if any(number is None or number.size != 1 for number in numbers):
        return None
    scale, zero, bits = (float(np.asarray(number).reshape(())) for number in numbers)
    flags = {attribute.name: attribute.i for attribute in node.attribute}
    least, most = rounding.bounds(int(bits), signed=bool(flags.get("signed", 1)), narrow=bool(flags.get("narrow", 0)))
    return min(0.0, (least - zero) * scale), max(0.0, (most - zero) * scale)


def _pass_on(model: onnx.ModelProto, output: str) -> None:
    """Connect an output of a ``Quant`` node directly to the node's input."""
    import onnx

    for index, node in enumerate(model.graph.node):
        if output in node.output:
            model.graph.node[index].CopyFrom(
                onnx.helper.make_node("Identity", [node.input[0]], [output], name=node.name)
            )


def _uses(model: onnx.ModelProto) -> bool:
    return any(node.domain == DOMAIN for node in model.graph.node)

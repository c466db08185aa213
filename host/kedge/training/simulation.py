"""Simulates a plan's precision in training: which graph is trained, what is done to its weights during training, and
what of that stays in the resulting graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch

from kedge.quantization import equalization
from kedge.step import Context
from kedge.training.network import Hook
from kedge.training.operators.quantization import rounded
from kedge_protocol.errors import LoweringError, StepError
from kedge_targets.graph import (
    fakequant,
    gptq,
    layers,
    node_tracing,
    qonnx_nodes,
    quantizer_preparation,
    quantizers,
    weight_encodings,
)
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Family, Plan, Precision

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor

_AT_ONCE = 32
_PROJECTED_AT_ONCE = {Precision.CODEBOOK4: 1 << 18, Precision.CODEBOOK8: 1 << 17}
_PROJECTED_OTHERWISE = 1 << 21
"""Number of weights of a layer up to which they are projected in every step; larger layers less often."""
_PROJECTED_EVERY = {Precision.CODEBOOK4: 8, Precision.CODEBOOK8: 8}
"""Least number of steps between two clusterings: the table hardly changes in one step, and finding it costs more than
the step."""


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """What is trained under a plan.

    Attributes:
        model: the graph, possibly with ``Quant`` nodes.
        hooks: of :class:`kedge.training.network.Network`.
        stays: whether the ``Quant`` nodes are part of the result; if not, they are removed from it.
        stored: weights that the result holds as the hooks return them, to be stored exactly so.
        quantized: whether any precision is simulated.
    """

    model: onnx.ModelProto
    hooks: dict[str, Hook]
    stays: bool = False
    stored: frozenset[str] = frozenset()
    quantized: bool = True


def simulate(model: onnx.ModelProto, context: Context) -> Simulation:
    """Simulate the precision of the context's plan.

    Raises:
        StepError: a range or weight cannot be quantized; the error names the tensor.
    """
    plan = context.plan
    families = {precision.family for precision in plan.precisions}
    try:
        if qonnx_nodes.is_quantized(model):
            return Simulation(model=model, hooks={}, stays=True)
        if Family.FABRIC in families:
            return _fabric(model, context)
        if families & {Family.STATIC, Family.DYNAMIC}:
            return _integers(model, context)
        if Family.WEIGHTS in families:
            return _stored_small(model, context)
    except LoweringError as error:
        raise StepError(error.what, where=error.where, remedy=error.remedy) from error
    return Simulation(model=model, hooks={}, quantized=False)


@dataclass(frozen=True)
class _Samples:
    """The context's samples, to be iterated over any number of times: some ranges take two passes."""

    context: Context

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return self.context.samples.batches(1 if self.context.fixed_batch else _AT_ONCE)


def _fabric(model: onnx.ModelProto, context: Context) -> Simulation:
    """Fuse batch normalization first, since logic computes the fused layer, and insert ``Quant`` nodes, which stay."""
    context.workdir.mkdir(parents=True, exist_ok=True)
    made = quantizer_preparation.prepare(model, context.workdir / "prepared.onnx", quantized=True)
    plan = _followed(context.plan, model, made)
    found = fakequant.calibrate(made, plan, _Samples(context))
    return Simulation(model=fakequant.insert_quantizers(made, plan, found), hooks={}, stays=True)


def _followed(plan: Plan, before: onnx.ModelProto, after: onnx.ModelProto) -> Plan:
    left: dict[str, Precision] = {}
    for name, precision in plan.layers.items():
        for now in node_tracing.trace_nodes([name], before, after):
            # Where a fused node stems from several, a layer with a precision of its own decides.
            if now not in left or precision is not plan.default:
                left[now] = precision
    return dataclasses.replace(plan, layers=left)


def _integers(model: onnx.ModelProto, context: Context) -> Simulation:
    """Quantize activations by ``Quant`` nodes with trained step sizes, and weights by their largest value, as every
    backend rounds them afterwards: a trained step size would not reach the backend."""
    found = fakequant.calibrate(model, context.plan, _Samples(context))
    made = fakequant.insert_quantizers(model, context.plan, found)
    wiring = Wiring(made)
    hooks: dict[str, Hook] = {}
    for node in [node for node in made.graph.node if node.op_type == "Quant"]:
        weight, steps, bits = (wiring.constant(name) for name in (node.input[0], node.input[1], node.input[3]))
        if weight is None or steps is None or bits is None:
            continue
        axis = next((index for index, size in enumerate(steps.shape) if size > 1), None)
        hooks[node.input[0]] = _by_largest(axis, 2.0 ** (float(bits) - 1) - 1)
        for reader in made.graph.node:
            for index, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[index] = node.input[0]
        made.graph.node.remove(node)
    return Simulation(model=made, hooks=hooks)


def _by_largest(axis: int | None, highest: float) -> Hook:
    def hook(weight: Tensor) -> Tensor:
        magnitude = weight.detach().abs()
        if axis is None:
            largest = magnitude.max()
        else:
            largest = magnitude.amax([index for index in range(weight.ndim) if index != axis], keepdim=True)
        step = torch.where(largest > 0, largest / highest, torch.ones_like(largest))
        return rounded(weight / step) * step

    return hook


def _stored_small(model: onnx.ModelProto, context: Context) -> Simulation:
    """Keep weights in their stored form. Low-bit weights start from the backend's rounding, which is far better than
    rounding each weight on its own."""
    plan = context.plan
    made = onnx.ModelProto()
    made.CopyFrom(model)
    equalization.fold_batch_normalization(made)
    found = layers.layers(made)
    precisions = {layer.name: quantizers.precision_of(layer.name, plan) for layer in found}
    coarse = {name: one for name, one in precisions.items() if gptq.applies(one)}
    rounded = gptq.round_weights(
        made,
        _Samples(context),
        coarse,
        group_size=plan.group_size,
        asymmetric=plan.asymmetric_weights,
        seed=context.seed,
    )
    stored = [tensor for tensor in made.graph.initializer if tensor.name in rounded]
    for tensor in stored:
        tensor.CopyFrom(onnx.numpy_helper.from_array(rounded[tensor.name], tensor.name))
    hooks: dict[str, Hook] = {
        layer.weight: _Projection(precisions[layer.name], layer.axis or 0, plan, context.seed, layer.size)
        for layer in found
        if layer.weight is not None and precisions[layer.name].family is Family.WEIGHTS
    }
    return Simulation(model=made, hooks=hooks, stored=frozenset(tensor.name for tensor in stored))


class _Projection:
    """Projects a weight to its stored form, straight through for the gradient. Large layers and codebooks reuse a
    projection for some steps; without gradients it is always up to date. An evaluation restarts the count, so that
    training resumed from the checkpoint of an evaluation does the same as uninterrupted training."""

    def __init__(self, precision: Precision, axis: int, plan: Plan, seed: int, size: int) -> None:
        self._precision, self._axis, self._plan, self._seed = precision, axis, plan, seed
        turns = size // _PROJECTED_AT_ONCE.get(precision, _PROJECTED_OTHERWISE)
        self._every = _PROJECTED_EVERY.get(precision, 1) + turns
        self._age = 0
        self._made: Tensor | None = None
        self._of: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        values = weight.detach()
        if torch.is_grad_enabled():
            self._age += 1
            due = self._made is None or self._age > self._every
        else:
            self._age = 0
            due = self._of is None or not torch.equal(self._of, values)
        if due or self._made is None:
            self._made = torch.from_numpy(self._projected(values.numpy()))
            self._of, self._age = values.clone(), min(self._age, 1)
        return weight + (self._made - values)

    def _projected(self, values: Array) -> Array:
        made = weight_encodings.dequantized(
            values,
            self._precision,
            axis=self._axis,
            group_size=self._plan.group_size,
            asymmetric=self._plan.asymmetric_weights,
            seed=self._seed,
        )
        return np.ascontiguousarray(made)


_FEW_BITS = 4
_RATE_OF_FEW_BITS = 4e-3
_RATE_OF_EIGHT_BITS = 1e-4


def usual_rate(model: onnx.ModelProto, plan: Plan) -> float | None:
    """Return the learning rate that suits the bit width: low-bit weights must move far to reach the next value, 8-bit
    weights are nearly right already. None if the rate of the kind of network suits."""
    quantized = [precision for precision in plan.precisions if precision.needs_calibration]
    if qonnx_nodes.is_quantized(model) or any(precision.weight_bits <= _FEW_BITS for precision in quantized):
        return _RATE_OF_FEW_BITS
    return _RATE_OF_EIGHT_BITS if quantized or Precision.INT8_DYNAMIC in plan.precisions else None


def finish(learnt: onnx.ModelProto, start: Simulation, context: Context) -> onnx.ModelProto:
    """Return the trained graph as the backend takes it: without ``Quant`` nodes unless they stay, and with low-bit
    weights as they are stored. The trained ranges go to the context."""
    if start.stays:
        return learnt
    graph, ranges = fakequant.remove_quantizers(learnt)
    context.ranges.update(ranges)
    for tensor in graph.graph.initializer:
        if tensor.name in start.stored:
            made = start.hooks[tensor.name](torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()))
            tensor.CopyFrom(onnx.numpy_helper.from_array(made.detach().numpy(), tensor.name))
    return graph

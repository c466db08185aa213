"""Channel rules of layers: products, normalization, element-wise operators, pooling.

A rule takes a node whose tensors were all observed and returns what the axes of each output carry (ONNX operator
specifications), or None if it cannot handle the node: then everything that touches the node is held.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kedge.pruning.channel_ids import Axes, Ids
from kedge.pruning.rule_scope import Scope, attribute, integers

if TYPE_CHECKING:
    import onnx

Rule = Callable[["onnx.NodeProto", Scope], "list[Axes] | None"]


def convolution(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Conv: data (N, C, space), weights (O, C / groups, space), bias (O)."""
    data, weight = node.input[0], node.input[1]
    channels, (out, into, *kernel) = scope.whole(data, 1), scope.of(weight)
    scope.tracker.hold(*kernel, *scope.of(data)[2:])
    groups = attribute(node, "group", 1)
    if scope.given(node, 2):
        scope.tracker.join(out, scope.of(node.input[2])[0])
    if groups == 1:
        scope.tracker.join(channels, into)
        scope.consuming.add((weight, 1))
    else:
        _grouped(scope, weight, channels, groups)
    scope.producing.add((weight, 0))
    return [(scope.of(data)[0], out, *(None for _ in kernel))]


def _grouped(scope: Scope, weight: str, channels: Ids | None, groups: int) -> None:
    """Join channels so that all groups keep the same number. Many small groups (depthwise convolution) are cut as a
    whole; a few large ones each lose the channel at the same position."""
    tracker = scope.tracker
    out, into = scope.of(weight)[:2]
    if channels is None or out is None:
        tracker.hold(channels, out, into)
        return
    each = len(channels) // groups
    if groups >= each:
        tracker.hold(into)
        tracker.join(tracker.together(channels.reshape(groups, each)), tracker.together(out.reshape(groups, -1)))
        return
    tracker.join(tracker.together(channels.reshape(groups, each).T), into)
    tracker.together(out.reshape(groups, -1).T)
    scope.consuming.add((weight, 1))


def transposed_convolution(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through ConvTranspose: data (N, C, space), weights (C, O / groups, space), bias (O)."""
    if attribute(node, "group", 1) != 1:
        return None
    data, weight = node.input[0], node.input[1]
    into, out, *kernel = scope.of(weight)
    scope.tracker.hold(*kernel, *scope.of(data)[2:])
    scope.tracker.join(scope.whole(data, 1), into)
    if scope.given(node, 2):
        scope.tracker.join(out, scope.of(node.input[2])[0])
    scope.consuming.add((weight, 0))
    scope.producing.add((weight, 1))
    return [(scope.of(data)[0], out, *(None for _ in kernel))]


def gemm(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Gemm: A (M, K) times B (K, N) or (N, K), plus C broadcast to (M, N)."""
    if attribute(node, "transA", 0):
        return None
    left, right = node.input[0], node.input[1]
    transposed = bool(attribute(node, "transB", 0))
    into, out = (1, 0) if transposed else (0, 1)
    scope.tracker.join(scope.of(left)[1], scope.of(right)[into])
    if right in scope.constants:
        scope.consuming.add((right, into))
        scope.producing.add((right, out))
    made: Axes = (scope.of(left)[0], scope.of(right)[out])
    if scope.given(node, 2):
        made = _aligned(scope, [(made, scope.lengths(node.output[0])), _side(scope, node.input[2])], 2)
    return [made]


def matrix_product(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through MatMul of (batch, M, K) and (batch, K, N). The batch axes of two activations carry
    heads."""
    left, right = node.input
    if scope.rank(left) < 2 or scope.rank(right) < 2:
        return None
    first, second = scope.of(left), scope.of(right)
    scope.tracker.join(first[-1], second[-2])
    rank = max(len(first), len(second)) - 2
    batch = _aligned(scope, [(first[:-2], scope.lengths(left)[:-2]), (second[:-2], scope.lengths(right)[:-2])], rank)
    if left not in scope.constants and right not in scope.constants:
        scope.heads += [ids for ids in batch if ids is not None]
    for name, into, out in ((right, -2, -1), (left, -1, -2)):
        if name in scope.constants:
            scope.consuming.add((name, scope.rank(name) + into))
            scope.producing.add((name, scope.rank(name) + out))
    return [(*batch, first[-2], second[-1])]


def batch_normalization(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through BatchNormalization in inference: four vectors along the channels."""
    if len([name for name in node.output if name]) > 1:
        return None
    axes = scope.of(node.input[0])
    for name in node.input[1:5]:
        scope.tracker.join(axes[1], scope.of(name)[0])
    scope.scaling.add((node.input[1], 0))
    return [axes]


def instance_normalization(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through InstanceNormalization: each channel by itself."""
    axes = scope.of(node.input[0])
    scope.tracker.hold(*axes[2:])
    for name in node.input[1:3]:
        scope.tracker.join(axes[1], scope.of(name)[0])
    scope.scaling.add((node.input[1], 0))
    return [(*axes[:2], *(None for _ in axes[2:]))]


def unary(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through operators on single elements; further inputs (limits, ratios) are scalars."""
    scope.hold(*filter(None, node.input[1:]))
    return [scope.of(node.input[0]) for _ in node.output]


def elementwise(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through element-wise operators with broadcasting (ONNX, Broadcasting.md)."""
    sides = [_side(scope, name) for name in node.input if name]
    return [_aligned(scope, sides, scope.rank(node.output[0]))]


Side = tuple[Axes, "tuple[tuple[int, int], ...]"]


def _side(scope: Scope, name: str) -> Side:
    return scope.of(name), scope.lengths(name)


def _aligned(scope: Scope, sides: list[Side], rank: int) -> Axes:
    made: list[Ids | None] = []
    for position in range(-rank, 0):
        meeting = [
            (axes[position], lengths[position])
            for axes, lengths in sides
            if -position <= len(axes) and lengths[position] != (1, 1)
        ]
        carried = [ids for ids, _ in meeting if ids is not None]
        if len(carried) < len(meeting) or len({length for _, length in meeting}) > 1:
            scope.tracker.hold(*carried)
            made.append(None)
            continue
        for ids in carried[1:]:
            scope.tracker.join(carried[0], ids)
        made.append(carried[0] if carried else None)
    return tuple(made)


def pooling(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through pooling: batch and channels continue, the spatial axes are held."""
    axes = scope.of(node.input[0])
    scope.tracker.hold(*axes[2:])
    return [(*axes[:2], *(None for _ in axes[2:])) for _ in node.output]


def along(first_axis_only: bool) -> Rule:
    """Return the rule of operators that mix values along ``axis``, or along all axes from ``axis`` on if not
    ``first_axis_only``."""

    def rule(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
        axes = scope.of(node.input[0])
        axis = attribute(node, "axis", -1) % max(1, len(axes))
        mixed = {axis} if first_axis_only else set(range(axis, len(axes)))
        scope.tracker.hold(*(axes[index] for index in mixed))
        scope.hold(*filter(None, node.input[1:]))
        kept = tuple(None if index in mixed else ids for index, ids in enumerate(axes))
        # Outputs beside the first (mean, deviation) may have other axes.
        scope.tracker.hold(*(ids for ids in kept if ids is not None and len(list(filter(None, node.output))) > 1))
        return [kept, *(tuple(None for _ in range(scope.rank(name))) for name in node.output[1:])]

    return rule


def softmax(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through Softmax and similar operators; before opset 13 all axes from ``axis`` on count as one."""
    old = any(opset.domain in ("", "ai.onnx") and opset.version < 13 for opset in scope.model.opset_import)
    if old and attribute(node, "axis") is None:
        axes = scope.of(node.input[0])
        scope.tracker.hold(*axes[1:])
        return [(*axes[:1], *(None for _ in axes[1:]))]
    return along(not old)(node, scope)


def reduction(node: onnx.NodeProto, scope: Scope) -> list[Axes] | None:
    """Follow channels through sums, means and other reductions: the reduced axes are held."""
    axes = scope.of(node.input[0])
    if scope.given(node, 1) and scope.constant(node, 1) is None:
        return None
    named = integers(scope.constant(node, 1)) if scope.given(node, 1) else attribute(node, "axes")
    if not named and attribute(node, "noop_with_empty_axes", 0):
        return [axes]
    summed = {axis % max(1, len(axes)) for axis in named} if named else set(range(len(axes)))
    scope.tracker.hold(*(axes[axis] for axis in summed))
    if attribute(node, "keepdims", 1):
        return [tuple(None if axis in summed else ids for axis, ids in enumerate(axes))]
    return [tuple(ids for axis, ids in enumerate(axes) if axis not in summed)]


_UNARY = frozenset({
    "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Cast", "Ceil", "Celu", "Clip", "Cos",
    "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN",
    "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin",
    "Sinh", "Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu", "FastGelu", "QuickGelu",
})  # fmt: skip
_ELEMENTWISE = frozenset({
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod",
    "Mul", "Or", "PRelu", "Pow", "Sub", "Sum", "Where", "Xor", "BiasGelu",
})  # fmt: skip
_REDUCTIONS = frozenset({
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
})  # fmt: skip
_POOLING = frozenset({"AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool", "MaxPool"})

RULES: dict[str, Rule] = {
    "Conv": convolution,
    "ConvTranspose": transposed_convolution,
    "Gemm": gemm,
    "MatMul": matrix_product,
    "BatchNormalization": batch_normalization,
    "InstanceNormalization": instance_normalization,
    "Softmax": softmax,
    "LogSoftmax": softmax,
    "Hardmax": softmax,
    "LayerNormalization": along(False),
    "RMSNormalization": along(False),
    "SimplifiedLayerNormalization": along(False),
    "LpNormalization": along(True),
    **dict.fromkeys(_UNARY, unary),
    **dict.fromkeys(_ELEMENTWISE, elementwise),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_POOLING, pooling),
}  # fmt: skip

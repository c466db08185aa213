"""Checks that a step has not made an activation's range explode, which no low-precision format survives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from kedge.step import Context
from kedge_protocol.errors import KedgeError, StepError
from kedge_targets.graph import ranges

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

LARGEST = 1000.0
"""Factor by which a range may grow. Equalizing two layers moves factors of some tens."""
_SMALL = 1e-3
"""Share of the largest range: smaller ranges may grow as if they were this large."""
_SAMPLES = 4


def check(before: onnx.ModelProto, after: onnx.ModelProto, context: Context, *, where: str) -> None:
    """Compare the ranges of the activations that both graphs have, on a few calibration samples.

    Args:
        before, after: graphs with inferred shapes; graphs with QONNX's nodes are not checked.
        where: the step's name, for messages.

    Raises:
        StepError: an activation grew too much or is no longer finite; the error names it and the node that makes it.
    """
    makers = {tensor: node.name for node in after.graph.node for tensor in node.output if tensor}
    common = [tensor for tensor in _activations(before) if tensor in makers]
    samples = list(_first(context))
    if not samples or not common or any(node.domain not in ("", "ai.onnx") for node in after.graph.node):
        return
    try:
        was = _largest(before, samples, common)
    except KedgeError:  # what was wrong before is not the step's doing
        return
    try:
        now = _largest(after, samples, common)
    except KedgeError as error:
        raise StepError(f"the graph that it makes does not run: {error}", where=where) from error
    floor = _SMALL * max(was.values())
    for tensor in common:
        allowed = LARGEST * max(was[tensor], floor)
        if now[tensor] > allowed > 0.0:
            raise StepError(
                f"makes the range of {tensor!r} (node {makers[tensor]!r}) explode: {was[tensor]:.3g} before, "
                f"{now[tensor]:.3g} behind it",
                where=where,
                remedy="Leave this step out; look at this layer's weights, some may be next to nothing",
            )


def _activations(model: onnx.ModelProto) -> list[str]:
    import onnx

    floating = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return [tensor for node in model.graph.node for tensor in node.output if tensor in floating]


def _first(context: Context) -> Iterator[Mapping[str, Array]]:
    for count, feed in enumerate(context.samples.batches(1)):
        if count >= _SAMPLES:
            return
        yield feed


def _largest(model: onnx.ModelProto, samples: list[Mapping[str, Array]], tensors: list[str]) -> dict[str, float]:
    found = ranges.observe(model, samples, tensors)
    return {name: max(-low, high) for name, (low, high) in found.items()}

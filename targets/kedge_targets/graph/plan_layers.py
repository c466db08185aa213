"""Applies a plan to a graph: the precision of each layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_protocol.errors import LoweringError
from kedge_targets.numerics import Family, Plan, Precision

if TYPE_CHECKING:
    import onnx


def leading(plan: Plan) -> Precision:
    """Return the precision that decides how a graph is lowered: the smallest in the plan.

    Raises:
        LoweringError: two families (:class:`kedge_targets.numerics.Family`) besides float32 in one plan.
    """
    families = {precision.family for precision in plan.precisions} - {Family.FLOAT}
    if len(families) > 1:
        mixed = " and ".join(precision.value for precision in Precision if precision in plan.precisions)
        raise LoweringError(
            f"the plan mixes {mixed} layers", remedy="Leave the layers that are not of the smaller kind in float32"
        )
    return next(precision for precision in Precision if precision in plan.precisions)


def others(plan: Plan, model: onnx.ModelProto, precision: Precision) -> list[str]:
    """Return the nodes that the plan wants in a different precision, in graph order.

    Raises:
        LoweringError: the plan names a node that the graph has not.
    """
    names = [node.name for node in model.graph.node]
    if unknown := sorted(set(plan.layers) - set(names)):
        raise LoweringError(
            "the plan names a layer that the graph has not",
            where=f"node {unknown[0]!r}",
            remedy="Take the names from the graph's nodes",
        )
    return [name for name in names if plan.layers.get(name, plan.default) is not precision]

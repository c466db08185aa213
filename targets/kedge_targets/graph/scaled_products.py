"""Finds where a product of integers is multiplied with the scales of its factors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Product:
    """A MatMulInteger or ConvInteger up to its last scale.

    Attributes:
        answer: the product in float.
        factor: what it is multiplied with beside the scales of each call.
        dynamic_right: whether its second factor is rounded by the range of each call, too.
        inner: what the nodes between give, the answer too.
    """

    answer: str
    factor: Array
    dynamic_right: bool
    inner: frozenset[str]


def product_of(node: onnx.NodeProto, wiring: Wiring) -> Product | None:
    """Return how a product of integers ends: a Cast to float, and one Mul or several with the scale of the first
    factor, that of each call, and of the second, constant or of each call. None where it ends in another way."""
    scales = [_scale_of_each_call(node.input[index], wiring) for index in (0, 1)]
    if scales[0] is None or (scales[1] is None and wiring.constant(node.input[1]) is None):
        return None
    missing = [scale for scale in scales if scale is not None]
    cast = _only_reader(node.output[0], wiring)
    if cast is None or cast.op_type != "Cast" or any(one.name == "to" and one.i != 1 for one in cast.attribute):
        return None
    tensor, factor, inner = cast.output[0], np.ones(()), {node.output[0], cast.output[0]}
    while missing:
        scaling = _only_reader(tensor, wiring)
        if scaling is None or scaling.op_type != "Mul":
            return None
        other = scaling.input[1] if scaling.input[0] == tensor else scaling.input[0]
        found = _factors(other, missing, wiring)
        if found is None:
            return None
        factor, tensor = factor * found, scaling.output[0]
        inner.add(tensor)
    return Product(
        answer=tensor, factor=np.asarray(factor), dynamic_right=scales[1] is not None, inner=frozenset(inner)
    )


def _scale_of_each_call(tensor: str, wiring: Wiring) -> str | None:
    """Return the scale of what DynamicQuantizeLinear gives, possibly moved."""
    maker = wiring.maker.get(wiring.source(tensor))
    return str(maker.output[1]) if maker is not None and maker.op_type == "DynamicQuantizeLinear" else None


def _only_reader(tensor: str, wiring: Wiring) -> onnx.NodeProto | None:
    readers = wiring.readers[tensor]
    return readers[0][0] if len(readers) == 1 and tensor not in wiring.outputs else None


def _factors(tensor: str, missing: list[str], wiring: Wiring) -> Array | None:
    """Return the constant part of a product of scales, and take those of each call from the missing ones; None where
    anything else is in it."""
    value = wiring.constant(tensor)
    if value is not None:
        return np.asarray(value, np.float64)
    if tensor in missing:
        missing.remove(tensor)
        return np.ones(())
    maker = wiring.maker.get(tensor)
    if maker is None or maker.op_type != "Mul":
        return None
    parts = [_factors(one, missing, wiring) for one in maker.input]
    if parts[0] is None or parts[1] is None:
        return None
    return np.asarray(parts[0] * parts[1])

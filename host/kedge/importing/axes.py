"""Gives the free axes of an exported graph readable names: exporters call them ``s23`` or ``unk__126``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

BATCH = "batch"


def rename_axes(model: onnx.ModelProto, known: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Name the free axes of inputs and outputs in place; inferred shapes are removed, because they hold the old names.

    The first axis of an input is the batch; an axis whose symbol is in ``known`` gets that name, and any other gets
    the input's name and its number (``ids_1``). Axes of the same symbol share one name.

    Args:
        known: symbol → name.

    Returns:
        The distinct names of the inputs' free axes, in order.
    """
    names = dict(known or {})
    found: list[str] = []
    constant = {tensor.name for tensor in model.graph.initializer}
    for value in model.graph.input:
        if value.name in constant:
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value > 0:
                continue
            fallback = BATCH if axis == 0 else f"{value.name}_{axis}"
            name = names.setdefault(dim.dim_param, fallback) if dim.dim_param else fallback
            dim.dim_param = name
            if name not in found:
                found.append(name)
    for value in model.graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
            elif dim.dim_param:
                # Of an expression (2*s23) or of a symbol that no input has.
                expression = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), dim.dim_param)
                batch = axis == 0 and BATCH in found
                dim.dim_param = BATCH if batch and expression == dim.dim_param else expression
    del model.graph.value_info[:]
    return tuple(found)

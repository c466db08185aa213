"""Fixes dynamic axes other than the batch (a sentence's length) for devices that need fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from kedge_protocol.errors import LoweringError
from kedge_targets.graph import model_reader, signature

if TYPE_CHECKING:
    import onnx

    from kedge_targets.contract import Calibration


def settle(model: onnx.ModelProto, calibration: Calibration, *, device: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model with dynamic axes other than the batch fixed to the calibration samples' sizes, and a note on
    what was fixed. A model without such axes is returned unchanged.

    Args:
        device: that wants it, for messages.

    Raises:
        LoweringError: the samples have several sizes, or there are none.
    """
    free = [
        (info.name, axis)
        for info in signature.inputs(model)
        for axis, length in enumerate(info.shape)
        if axis > 0 and length is None
    ]
    if not free:
        return model, ()
    seen: dict[tuple[str, int], set[int]] = {place: set() for place in free}
    for sample in calibration:
        for (name, axis), sizes in seen.items():
            sizes.add(np.asarray(sample[name]).shape[axis])
    for (name, axis), sizes in seen.items():
        if len(sizes) != 1:
            found = f"the calibration samples have {min(sizes)} to {max(sizes)}" if sizes else "there are no samples"
            raise LoweringError(
                f"axis {axis} is free and {device} needs one size; {found}",
                where=f"input {name!r}",
                remedy="Fill all samples up to one size (the model's mask hides the rest), or export with fixed axes",
            )
    chosen = {place: sizes.pop() for place, sizes in seen.items()}
    words = ", ".join(f"axis {axis} of {name} to {size}" for (name, axis), size in chosen.items())
    return fix_dimensions(model, chosen), (f"fixed as the calibration samples have it: {words}",)


def fix_dimensions(model: onnx.ModelProto, sizes: Mapping[tuple[str, int], int]) -> onnx.ModelProto:
    """Return a copy whose inputs have these sizes (input and axis → size) and newly inferred shapes; axes with the same
    symbol follow."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known: dict[str, int] = {}
    for value in copy.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in sizes:
                if dim.dim_param:
                    known[dim.dim_param] = sizes[value.name, axis]
                dim.dim_value = sizes[value.name, axis]
    for value in (*copy.graph.input, *copy.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in known:
                dim.dim_value = known[dim.dim_param]
    # What was inferred holds the symbols still.
    del copy.graph.value_info[:]
    return model_reader.infer_shapes(copy, where="graph with its sizes fixed")

"""Fixes dynamic axes other than the batch (a sentence's length) for devices that need fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import LoweringError
from kedge_targets import free_lengths
from kedge_targets.graph import model_reader, signature
from kedge_targets.graph.changed_calibration import ChangedCalibration

if TYPE_CHECKING:
    import onnx

    from kedge_targets.contract import Calibration

Array = npt.NDArray[Any]


def settle(model: onnx.ModelProto, calibration: Calibration, *, device: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the model with dynamic axes other than the batch fixed to the calibration samples' sizes, and a note on
    what was fixed: to the longest, where samples differ in length. A model without such axes is returned unchanged.

    Args:
        device: that wants it, for messages.

    Raises:
        LoweringError: there are no samples, or they differ in length and so does an output, nobody knows how.
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
        if not sizes:
            raise LoweringError(
                f"axis {axis} is free and {device} needs one size; there are no samples",
                where=f"input {name!r}",
                remedy="Give calibration samples, or export with fixed axes",
            )
    chosen = {place: max(sizes) for place, sizes in seen.items()}
    words = ", ".join(f"axis {axis} of {name} to {size}" for (name, axis), size in chosen.items())
    if all(len(sizes) == 1 for sizes in seen.values()):
        return fix_dimensions(model, chosen), (f"fixed as the calibration samples have it: {words}",)
    _check_outputs(model, chosen, device)
    note = (
        f"fixed to the longest calibration samples: {words}; shorter ones are filled up with zeros, here and on the "
        "device, and longer ones are refused"
    )
    return fix_dimensions(model, chosen), (note,)


def _check_outputs(model: onnx.ModelProto, chosen: Mapping[tuple[str, int], int], device: str) -> None:
    """Refuse a model with an output of which nobody could tell how much of it belongs to a sample that was filled up:
    each length must be an input's own, and no two inputs' lengths may be alike by chance.

    Raises:
        LoweringError: it is not so.
    """
    named: dict[str, int] = {}
    for value in model.graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, axis) in chosen:
                named[dim.dim_param or f"{value.name} {axis}"] = chosen[value.name, axis]
    for value in model.graph.output:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if axis and not dim.dim_value and (dim.dim_param not in named or len(set(named.values())) < len(named)):
                raise LoweringError(
                    f"axis {axis} depends on the length of a sample, in a way that the graph does not state by the "
                    f"symbol of an input's axis; {device} needs one size, and the calibration samples have several",
                    where=f"output {value.name!r}",
                    remedy="Fill all samples up to one size (the model's mask hides the rest), or export with fixed "
                    "axes",
                )


class FilledCalibration(ChangedCalibration):
    """Calibration samples filled up with zeros to the sizes of a graph that :func:`settle` made."""

    def __init__(self, inner: Calibration, model: onnx.ModelProto) -> None:
        super().__init__(inner)
        self._sizes = {info.name: info.shape[1:] for info in signature.inputs(model)}

    def changed(self, name: str, array: Array) -> Array:
        """See :meth:`ChangedCalibration.changed`."""
        return free_lengths.filled(array, tuple(size or 0 for size in self._sizes[name]))


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

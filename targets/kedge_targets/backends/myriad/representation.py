"""Writes the FP16 representation that old and new releases read: IR version 10, operation sets 1 to 7, fixed shapes."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.errors import LoweringError, StorageError
from kedge_targets.backends.openvino import representation

ENTRY = representation.ENTRY
WEIGHTS = representation.WEIGHTS

_HALF_MAX = float(np.finfo(np.float16).max)


def halve(model: Any) -> int:
    """Convert float32 constants to FP16, each followed by a conversion back, in place.

    Returns:
        The count of numbers that were beyond FP16's range and are now its largest.
    """
    from openvino import opset1

    cut = 0
    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "Constant" or operation.get_element_type().get_type_name() != "f32":
            continue
        values = np.asarray(operation.get_data())
        beyond = np.isfinite(values) & (np.abs(values) > _HALF_MAX)
        cut += int(beyond.sum())
        name = operation.get_friendly_name()
        half = opset1.constant(
            np.clip(values, -_HALF_MAX, _HALF_MAX, where=beyond, out=values.copy()).astype("float16")
        )
        consumers = list(operation.output(0).get_target_inputs())
        whole = opset1.convert(half, "f32")
        whole.set_friendly_name(name)
        for consumer in consumers:
            consumer.replace_source_output(whole.output(0))
    model.validate_nodes_and_infer_types()
    return cut


def rename(model: Any, names: Collection[str]) -> None:
    """Rename layers independently of what else the process did, in place; the given names stay."""
    representation.rename(model, frozenset(names))


def save(model: Any, folder: Path, *, names: Collection[str]) -> dict[str, Path]:
    """Write a model with the same bytes each time.

    Args:
        model: an ``openvino.Model``; what its passes added is renamed.
        names: names of the trained model's nodes and tensors; these are kept.

    Returns:
        title → path of the two files.

    Raises:
        LoweringError: the model has something that version 10 cannot hold.
        StorageError: the disk is full or not writable.
    """
    from openvino.passes import Manager, Serialize, Version

    rename(model, names)
    entry, weights = folder / ENTRY, folder / WEIGHTS
    manager = Manager()
    manager.register_pass(Serialize(str(entry), str(weights), Version.IR_V10))
    try:
        manager.run_passes(model)
    except RuntimeError as error:
        raise LoweringError(f"cannot be written as IR version 10: {error}", where=entry.name) from error
    try:
        entry.write_bytes(representation.lean(entry.read_bytes()))
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(entry)) from error
    return {ENTRY: entry, WEIGHTS: weights}

"""Measures how large each channel of an activation becomes on the calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.quantization.equalization import ranges_along
from kedge.step import Context
from kedge_protocol.errors import StepError
from kedge_targets.graph import library

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_AT_ONCE = 8
"""Number of samples in one run of the graph."""


def largest_magnitudes(
    model: onnx.ModelProto, watched: Mapping[str, int], context: Context, *, limit: int, where: str
) -> dict[str, Array]:
    """Return the largest magnitude in each channel.

    Args:
        model: not changed.
        watched: name of an activation → the axis along which its channels lie.
        limit: largest number of samples.
        where: the step's name, for messages.

    Returns:
        Name → float array with one number per channel.

    Raises:
        StepError: there are no samples, or the graph does not run on them.
    """
    import onnx

    given = {value.name for value in model.graph.input}
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    fetched = [name for name in watched if name not in given]
    for name in fetched:
        if name not in known:
            probe.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = library.load().InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, Array] = {}
    for feed in _batches(context, limit):
        try:
            answers = dict(zip(fetched, session.run(fetched, feed) if fetched else [], strict=True))
        except Exception as error:  # the library's errors have no common base but Exception
            raise StepError(
                f"the graph does not run on the calibration samples: {library.reason_of(error)}", where=where
            ) from error
        for name, axis in watched.items():
            sizes = ranges_along(np.asarray(answers.get(name, feed.get(name))), axis)
            found[name] = np.maximum(found[name], sizes) if name in found else sizes
    if not found:
        raise StepError("there are no calibration samples", where=where, remedy="Give at least one")
    return found


def _batches(context: Context, limit: int) -> Iterator[dict[str, Array]]:
    done = 0
    size = 1 if context.fixed_batch else min(_AT_ONCE, limit)
    for feed in context.samples.batches(size):
        if done >= limit:
            return
        done += len(next(iter(feed.values())))
        yield feed

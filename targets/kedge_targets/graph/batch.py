"""The batch: the first axis of every input, dynamic or fixed."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError
from kedge_targets.graph import free_dimensions, signature

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


def size(model: onnx.ModelProto) -> int | None:
    """Return the graph's batch size; None if it is dynamic.

    Raises:
        ModelError: the inputs disagree, or one has no axes.
    """
    given = signature.inputs(model)
    for info in given:
        if not info.shape:
            raise ModelError("is a scalar, it has no batch axis", where=f"input {info.name!r}")
    sizes = {info.shape[0] for info in given}
    if len(sizes) != 1:
        listed = ", ".join(f"{info.name} {info.shape[0] or 'free'}" for info in given)
        raise ModelError(
            f"the inputs' first axes disagree ({listed}), they must all be the batch",
            remedy="Export the model with the batch as the first axis of every input",
        )
    return sizes.pop()


def fix_batch(model: onnx.ModelProto, samples: int) -> onnx.ModelProto:
    """Return a copy with a batch of exactly ``samples`` and newly inferred shapes; outputs that share the batch's
    symbol follow.

    Raises:
        ModelError: the graph's batch is fixed to another size already.
    """
    have = size(model)
    if have is not None and have != samples:
        raise ModelError(
            f"its batch is fixed to {have}, not {samples}", remedy="Export the model with a free batch axis"
        )
    return free_dimensions.fix_dimensions(model, {(info.name, 0): samples for info in signature.inputs(model)})


def regroup(samples: Iterable[dict[str, Array]], samples_at_once: int | None) -> Iterator[dict[str, Array]]:
    """Regroup batches of one sample into batches that the graph takes.

    Args:
        samples: input name → array whose first axis has length 1.
        samples_at_once: of :func:`size`; None leaves the samples alone. The last group is filled up with its last
            sample, which no range of values notices.
    """
    if samples_at_once is None or samples_at_once == 1:
        yield from samples
        return
    iterator = iter(samples)
    while group := list(itertools.islice(iterator, samples_at_once)):
        group += [group[-1]] * (samples_at_once - len(group))
        yield {name: np.concatenate([sample[name] for sample in group]) for name in group[0]}

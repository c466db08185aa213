"""Takes single samples out of answered calls, and says how sure an answer is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import tensors
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.frames import Call

Array = npt.NDArray[Any]

MOST_OF_A_CALL = 8


def rows(array: Array, spec: TensorSpec) -> Array:
    """Return a call's tensor with the samples along the first axis."""
    return array[None] if array.ndim < len(spec.shape) else tensors.to_batch_first(array, spec)


def are_scores(answers: Array) -> bool:
    """Return whether answers ``[samples, classes]`` are scores of classes."""
    return answers.ndim == 2 and answers.shape[1] > 1 and answers.dtype.kind == "f"


def confidence(scores: Array) -> Array:
    """Return each sample's largest probability; scores that are none go through a softmax."""
    scores = scores.astype(np.float64)
    top: Array = scores.max(axis=1)
    if np.all(scores >= 0) and np.allclose(scores.sum(axis=1), 1.0, atol=0.02):
        return top
    softmax: Array = 1.0 / np.exp(scores - top[:, None]).sum(axis=1)
    return softmax


def least_sure(call: Call, config: BundleConfig) -> Call | None:
    """Return the sample of a call with the least confidence; None where no output is scores of classes."""
    answers = {spec.name: rows(call.outputs[spec.name], spec) for spec in config.outputs}
    sure = _confidences(answers)
    if sure is None:
        return None
    return _one(call, config, answers, int(np.argmin(sure)), sure)


def disagreeing(call: Call, config: BundleConfig, alike: Array) -> Iterator[Call]:
    """Yield the samples of a call that another bundle answers otherwise, some of them at most.

    Args:
        alike: bool [samples].
    """
    answers = {spec.name: rows(call.outputs[spec.name], spec) for spec in config.outputs}
    sure = _confidences(answers)
    for place in np.flatnonzero(~alike)[:MOST_OF_A_CALL].tolist():
        yield _one(call, config, answers, place, sure, disagrees=True)


def _confidences(answers: Mapping[str, Array]) -> Array | None:
    return next((confidence(one) for one in answers.values() if are_scores(one)), None)


def _one(
    call: Call, config: BundleConfig, answers: Mapping[str, Array], place: int, sure: Array | None, *,
    disagrees: bool = False,
) -> Call:  # fmt: skip
    def of(spec: TensorSpec, array: Array) -> Array:
        return array[place : place + 1] if spec.batched else array

    return Call(
        digest=call.digest,
        nanoseconds=call.nanoseconds,
        inputs={spec.name: of(spec, rows(call.inputs[spec.name], spec)) for spec in config.inputs},
        outputs={spec.name: of(spec, answers[spec.name]) for spec in config.outputs},
        confidence=None if sure is None or not np.isfinite(sure[place]) else float(sure[place]),
        disagrees=disagrees,
    )

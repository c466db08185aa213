"""The confidence below which a cascade passes an item on, and what that gains: chosen and measured on evaluation data,
with the packed files in the device's runtime and the larger model at its server."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kedge.evaluation.dataset import Data
from kedge.evaluation.samples import Samples
from kedge.evaluation.worker_messages import Latency, Program
from kedge_protocol import tensors
from kedge_protocol.bundle.pipeline import Activation, Cascade, Scores
from kedge_protocol.errors import DatasetError, EndpointError
from kedge_targets.pipeline import cascades, scores
from kedge_targets.pipeline.larger_model import LargerModel
from kedge_targets.worker import Progress

Floats = npt.NDArray[np.float64]
Truths = npt.NDArray[np.bool_]

ASK = "kedge.evaluation.cascade:ask"
MEASURE = "kedge.evaluation.cascade:measure"
MOST = 2000
"""The maximum number of samples, spread evenly."""
_FOLDS = 5
_PATIENCE = 30.0
"""Seconds for one answer; a later one than the deadline counts as none."""
_TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class AskRequest:
    """Ask the larger model about the evaluation data.

    Attributes:
        cascade: with everything but ``below`` and ``activation`` settled.
        file: an ``.npz`` that is written: ``scores`` [N, classes] and ``seconds`` [N].
    """

    program: Program
    cascade: Cascade
    scores: Scores
    data: Data
    file: str


@dataclass(frozen=True, kw_only=True)
class AskAnswer:
    """The activation that the larger model lacks, and its version."""

    activation: Activation
    version: str


@dataclass(frozen=True, kw_only=True)
class MeasureRequest:
    """Choose the confidence for a lowered model.

    Attributes:
        cascade: settled; a stated ``below`` is kept.
        file: what :func:`ask` has written.
    """

    program: Program
    cascade: Cascade
    scores: Scores
    data: Data
    file: str


@dataclass(frozen=True, kw_only=True)
class CascadeFigures:
    """What a cascade gains on evaluation data.

    Attributes:
        model: the larger model, with its version.
        below: the confidence.
        chosen: whether it was chosen on these samples; then ``accuracy`` and ``share`` are cross-fitted: each fold's by
            the confidence that the other folds choose.
        samples: how many; ``folds`` of them.
        accuracy: the fraction of right answers of both models together, with answers after the deadline left out.
        device_accuracy, larger_accuracy: of each model alone.
        share: the fraction passed on; at most ``most``.
        late: the fraction of the larger model's answers that came after the deadline.
        device_ms, larger_ms, together_ms: latency on this host: of the device's model, of the larger one with the way
            to it and back, and of both together.
    """

    model: str
    below: float
    chosen: bool
    samples: int
    folds: int
    accuracy: float
    device_accuracy: float
    larger_accuracy: float
    share: float
    most: float
    late: float
    device_ms: Latency
    larger_ms: Latency
    together_ms: Latency


def ask(request: AskRequest, progress: Progress) -> AskAnswer:
    """Worker task; see :class:`AskRequest`.

    Raises:
        EndpointError: the larger model refuses, or has other classes.
    """
    samples = Samples(request.data)
    larger = LargerModel(request.cascade.url, request.cascade.model, request.cascade.version)
    sent = cascades.Inputs(request.cascade, request.program.inputs)
    indices, found, seconds, version = picked(samples.count), [], [], ""
    classes = _classes(request.program, request.scores)
    for number, index in enumerate(indices):
        raw = samples.picked([int(index)])
        feeds = {spec.name: tensors.from_batch_first(raw[spec.name], spec) for spec in request.program.inputs}
        began = time.perf_counter()
        answer = larger.infer(sent(feeds), _PATIENCE, output=request.cascade.output)
        seconds.append(time.perf_counter() - began)
        version = answer.version
        found.append(cascades.larger_scores(answer, request.cascade.output, classes, where=larger.where)[0])
        progress("larger model", number + 1, len(indices))
    larger.close()
    values = np.asarray(found, np.float64)
    np.savez(request.file, scores=values, seconds=np.asarray(seconds))
    return AskAnswer(activation=_activation(values, request.scores), version=version)


def measure(request: MeasureRequest, progress: Progress) -> CascadeFigures:
    """Worker task; see :class:`MeasureRequest`.

    Raises:
        DatasetError: the evaluation data has no class numbers as labels.
        VerificationError: the runtime refuses the file.
    """
    samples, how = Samples(request.data), request.cascade
    indices = picked(samples.count)
    labels = None if samples.label is None else np.asarray(samples.label)[indices]
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DatasetError(
            "has no class numbers as labels", where="evaluation", remedy="Give labels, or state below in [cascade]"
        )
    with np.load(Path(request.file)) as asked:
        larger, away = asked["scores"], asked["seconds"]
    values, here = _run(request, samples, indices, progress)
    confidence = cascades.confidences(values, request.scores)
    late = away * 1000 > how.deadline_ms
    right = scores.activated(values, request.scores.activation).argmax(axis=-1) == labels
    larger_right = larger.argmax(axis=-1) == labels
    helped = np.where(late, right, larger_right)
    below = how.below
    if below is None:
        below = chosen_confidence(confidence, right, helped, how.share)
        passed = cross_fitted(confidence, right, helped, how.share)
    else:
        passed = confidence < below
    together = here + np.where(passed, np.minimum(away, how.deadline_ms / 1000), 0.0)
    return CascadeFigures(
        model=how.model,
        below=below,
        chosen=how.below is None,
        samples=len(indices),
        folds=_FOLDS if how.below is None else 1,
        accuracy=float(np.where(passed, helped, right).mean()),
        device_accuracy=float(right.mean()),
        larger_accuracy=float(larger_right.mean()),
        share=float(passed.mean()),
        most=how.share,
        late=float(late.mean()),
        device_ms=_latency(here),
        larger_ms=_latency(away),
        together_ms=_latency(together),
    )


def picked(count: int) -> npt.NDArray[np.int64]:
    """Return the indices of the samples that are used: all, or :data:`MOST` of them, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST)).astype(np.int64))


def chosen_confidence(confidence: Floats, right: Truths, helped: Truths, most: float) -> float:
    """Return the confidence below which items are passed on, so that most answers are right; of several the one that
    passes on the fewest: at most the fraction ``most`` of these items, and none where that gains nothing.

    Args:
        confidence: the device's model's best score of each item, ``[N]``.
        right: whether its answer is right.
        helped: whether the answer is right if the item is passed on.
        most: 0..1.
    """
    order = np.argsort(confidence, kind="stable")
    ranked = confidence[order]
    gains = np.concatenate([[0], np.cumsum(helped[order].astype(int) - right[order].astype(int))])
    count = len(ranked)
    # Items of equal confidence go together.
    possible = [
        passed
        for passed in range(int(most * count + 1e-9) + 1)
        if passed in (0, count) or ranked[passed - 1] < ranked[passed]
    ]
    best = max(possible, key=lambda passed: (gains[passed], -passed))
    if best == 0:
        return 0.0
    upper = 1.0 if best == count else float(ranked[best])
    return float((ranked[best - 1] + upper) / 2) if upper > ranked[best - 1] else upper


def cross_fitted(confidence: Floats, right: Truths, helped: Truths, most: float) -> Truths:
    """Return which items are passed on if each fold's confidence is chosen on the others."""
    fold = np.arange(len(confidence)) % _FOLDS
    passed = np.zeros(len(confidence), bool)
    for one in range(_FOLDS):
        others = fold != one
        if others.any():
            below = chosen_confidence(confidence[others], right[others], helped[others], most)
            passed[~others] = confidence[~others] < below
    return passed


def _run(
    request: MeasureRequest, samples: Samples, indices: npt.NDArray[np.int64], progress: Progress
) -> tuple[Floats, Floats]:
    """Return the device's model's scores, and the seconds of each call."""
    executor = request.program.open()
    found, seconds = [], []
    try:
        for number, index in enumerate(indices):
            raw = samples.picked([int(index)])
            began = time.perf_counter()
            outputs = executor.on_samples(raw)
            seconds.append(time.perf_counter() - began)
            name = request.scores.output or executor.outputs[0].name
            found.append(np.asarray(outputs[name], np.float64).reshape(-1))
            progress("cascade", number + 1, len(indices))
    finally:
        executor.close()
    return np.asarray(found), np.asarray(seconds)


def _classes(program: Program, how: Scores) -> int:
    spec = next((one for one in program.outputs if one.name == how.output), program.outputs[0])
    sizes = [axis for place, axis in enumerate(spec.shape) if place != spec.batch_axis]
    if any(axis is None for axis in sizes):
        raise EndpointError("the scores' number is free, a cascade needs a fixed one", where=spec.name)
    return int(np.prod([axis or 1 for axis in sizes]))


def _activation(values: Floats, own: Scores) -> Activation:
    """Return what the larger model's scores lack to be probabilities."""
    inside = bool((values >= -_TOLERANCE).all() and (values <= 1 + _TOLERANCE).all())
    if own.activation is Activation.SIGMOID:
        return Activation.NONE if inside else Activation.SIGMOID
    return Activation.NONE if inside and np.allclose(values.sum(axis=-1), 1, atol=_TOLERANCE) else Activation.SOFTMAX


def _latency(seconds: Floats) -> Latency:
    p50, p95 = np.percentile(seconds * 1000, (50, 95))
    return Latency(p50=float(p50), p95=float(p95))

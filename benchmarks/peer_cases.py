"""The models on which Kedge stands beside the runtimes' own quantizers, with their samples and what is judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import SHARED

Array = npt.NDArray[Any]

_MADE = 10_000
"""Samples that are judged where fresh ones are made of those at hand."""


@dataclass(frozen=True)
class Case:
    """A model with its samples.

    Attributes:
        evaluation: what a search judges by.
        judged: what both sides are judged by.
        origins: of each that is judged, the number of the sample that it was made of: these are drawn anew for an
            interval, with all that was made of them.
        quality: outputs over ``judged`` → a function of chosen samples: their accuracy, mean average precision, F1.
        raw: what ``Model.raw`` takes, as multiples of the model's own inputs.
    """

    model: Path
    calibration: Array
    evaluation: Array
    judged: Array
    origins: Array
    quality: Callable[[Array], Callable[[Array], float]]
    labels: Array | None = None
    raw: float = 1.0


def cases() -> dict[str, Callable[[], Case]]:
    """Name → the case, made at the first need; without the shared models where these are absent."""
    shared = {
        "ic_resnet8": lambda: _classified("ic_resnet8", "ic", 50, _moved_picture),
        "kws_dscnn": lambda: _classified("kws_dscnn", "kws", 200, _moved_sound),
    }
    return {**(shared if SHARED.exists() else {}), "own detector": _detector, "nudenet": _nudenet}


def _classified(name: str, data: str, count: int, changed: Callable[[Array, np.random.Generator], Array]) -> Case:
    """Beside each labelled sample are judged others that are made of it and keep its label."""
    with np.load(SHARED / "eval" / f"{data}.npz") as arrays:
        samples, labels = arrays["input"].astype(np.float32), arrays["label"]
    evaluation = samples[count:]
    rng = np.random.default_rng(0)
    origins = np.arange(_MADE) % len(evaluation)
    more = [changed(evaluation[origin], rng) for origin in origins[len(evaluation) :]]
    truth = labels[count:][origins]

    def quality(outputs: Array) -> Callable[[Array], float]:
        right = (outputs.reshape(len(outputs), -1).argmax(axis=1) == truth).astype(np.float64)
        return lambda chosen: float(right[chosen].mean())

    model = SHARED / "models" / f"{name}.onnx"
    judged = np.concatenate([evaluation, np.stack(more)])
    return Case(model, samples[:count], evaluation, judged, origins, quality, labels[count:])


def _moved_picture(picture: Array, rng: np.random.Generator) -> Array:
    """Up to two pixels aside, perhaps mirrored, a tenth lighter or darker; height x width x channels in 0..255."""
    down, right = rng.integers(0, 5, 2)
    height, width = picture.shape[:2]
    moved = np.pad(picture, ((2, 2), (2, 2), (0, 0)), mode="reflect")[down : down + height, right : right + width]
    moved = moved[:, ::-1] if rng.random() < 0.5 else moved
    return np.clip(np.rint(moved * np.float32(rng.uniform(0.9, 1.1))), 0, 255)


def _moved_sound(features: Array, rng: np.random.Generator) -> Array:
    """Up to two frames earlier or later, with noise of a twentieth of each coefficient's spread; frames x coefficients
    x 1."""
    at = int(rng.integers(0, 5))
    moved = np.pad(features, ((2, 2), (0, 0), (0, 0)), mode="edge")[at : at + len(features)]
    return np.asarray(moved + 0.05 * moved.std(axis=0) * rng.standard_normal(moved.shape), np.float32)


def _detector() -> Case:
    from tests.support import own_detector

    pictures, truth = own_detector.judged(500)

    def quality(outputs: Array) -> Callable[[Array], float]:
        return own_detector.precisions(outputs, truth).mean

    calibration = own_detector.calibration(96)
    return Case(own_detector.trained(), calibration, pictures, pictures, np.arange(len(pictures)), quality)


def _nudenet() -> Case:
    from tests.support import detections, photos, zoo

    model = zoo.nudenet()
    pictures = photos.crops(200, 320, seed=2)
    want = zoo.found(model.answers({"images": pictures})[0])

    def quality(outputs: Array) -> Callable[[Array], float]:
        got = zoo.found(outputs)
        return lambda chosen: detections.f1([want[i] for i in chosen], [got[i] for i in chosen])

    calibration = photos.crops(64, 320, seed=0)
    return Case(model.path, calibration, pictures, pictures, np.arange(len(pictures)), quality, raw=model.raw)

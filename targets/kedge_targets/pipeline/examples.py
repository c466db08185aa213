"""Examples in a bundle: raw items with the answers that the host measured, run through the whole pipeline on the device
before the bundle serves. They are stored in one file (:data:`FILE`), a JSON list of :class:`Example`."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol import codec
from kedge_protocol.errors import BundleError
from kedge_targets.pipeline import bodies, boxes
from kedge_targets.pipeline.execution import Raw, Runner
from kedge_targets.pipeline.neighbours import Neighbours

FILE = "examples.json"
MOST_BYTES = 64 << 10
"""The maximum total size of all raw items."""
FLOORS = {"score": 0.05, "corner": 2.0, "value": 0.02, "pixels": 0.02}
"""The smallest tolerances: of scores, of corners in pixels, of an embedding's values, of the fraction of pixels."""
_MARGIN = 2.0
_CORNERS = ("x1", "y1", "x2", "y2")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A raw item with its expected answer.

    Attributes:
        media: the content type.
        data: the bytes in base64.
        answer: the expected answer, as JSON.
        allowed: the tolerances of its numbers; see :data:`FLOORS`.
        others: the digests of the other bundles that took part, by model; it says nothing of others.
    """

    media: str
    data: str
    answer: Any
    allowed: dict[str, float]
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _File:
    examples: tuple[Example, ...]


def chosen(
    raws: Sequence[bytes], runner: Runner, models: Sequence[Raw], *, most: int = 2, others: Neighbours | None = None
) -> list[Example]:
    """Return the items on which all kernel sets give the same answer, with their tolerances; non-empty answers come
    first.

    Args:
        raws: the bytes of files or texts.
        models: one for each kernel set; the first one gives the expected answers.
        others: the models to which the pipeline goes on.
    """
    media = bodies.media_types(runner)[0]
    found: list[Example] = []
    for raw in raws:
        answers = [bodies.answer(runner, model, raw, media, other=others) for model in models]
        allowed = dict(FLOORS)
        for other in answers[1:]:
            for key, value in deviations(
                answers[0], other, FLOORS["score"], floor=_floor(runner), then_floor=_then_floor(runner)
            ).items():
                allowed[key] = max(allowed[key], _MARGIN * value)
        if all(np.isfinite(value) for value in allowed.values()):
            data = base64.b64encode(raw).decode()
            digests = {} if others is None else others.digests
            found.append(Example(media=media, data=data, answer=answers[0], allowed=allowed, others=digests))
    found.sort(key=lambda one: not one.answer)
    kept: list[Example] = []
    for one in found:
        if len(kept) < most and sum(len(each.data) for each in (*kept, one)) * 3 // 4 <= MOST_BYTES:
            kept.append(one)
    return kept


def save(examples: Sequence[Example], path: Path) -> None:
    """Write examples to a file."""
    path.write_bytes(codec.encode(_File(examples=tuple(examples))))


def load(path: Path) -> tuple[Example, ...]:
    """Read examples from a file.

    Raises:
        BundleError: the file cannot be read.
    """
    try:
        return codec.decode(path.read_bytes(), _File, where=path.name).examples
    except Exception as error:
        raise BundleError(f"cannot be read as examples: {error}", where=str(path)) from error


def failure(folder: Path, runner: Runner, raw: Raw, others: Neighbours | None = None) -> str:
    """Run a bundle's examples; return why the pipeline's answers differ from the host's, or an empty text. Pictures are
    skipped if nothing decodes them (no Pillow): such a device can only be given pixels. An example of several bundles
    in a row is skipped if others are here than those that took part (:func:`left_out`).

    Args:
        others: the other bundles on this device.

    Raises:
        BundleError: the examples cannot be read.
        MissingDependencyError: a package that the pipeline needs is not installed.
    """
    path = folder / FILE
    if not path.is_file() or (runner.pipeline.picture is not None and importlib.util.find_spec("PIL") is None):
        return ""
    for number, one in enumerate(load(path)):
        if _missing(one, others):
            continue
        actual = bodies.answer(runner, raw, base64.b64decode(one.data), one.media, other=others)
        over = {
            key: value
            for key, value in deviations(
                one.answer,
                actual,
                one.allowed.get("score", 0.0),
                floor=_floor(runner),
                then_floor=_then_floor(runner),
            ).items()
            if not value <= one.allowed.get(key, 0.0)
        }
        if over:
            key, value = next(iter(over.items()))
            by = "is another" if value == float("inf") else f"deviates by {value:.4g} ({key})"
            return f"the pipeline's answer to example {number} {by}; allowed are {one.allowed.get(key, 0.0):.4g}"
    return ""


def left_out(folder: Path, others: Neighbours | None) -> str:
    """Return which examples say nothing here, since another bundle of the row is here than took part; or an empty
    text."""
    path = folder / FILE
    missing = [name for one in load(path) for name in _missing(one, others)] if path.is_file() else []
    return f"examples of the whole row were left out: another {missing[0]!r} is here" if missing else ""


def _missing(one: Example, others: Neighbours | None) -> list[str]:
    here = {} if others is None else others.digests
    return [name for name, digest in one.others.items() if here.get(name) != digest]


def _then_floor(runner: Runner) -> float:
    return 0.0 if runner.pipeline.then is None else runner.pipeline.then.answer_floor


def _floor(runner: Runner) -> float | None:
    section = runner.pipeline.boxes or runner.pipeline.regions
    return None if section is None else section.score_floor


def deviations(
    expected: Any, actual: Any, unsure: float, *, floor: float | None = None, then_floor: float = 0.0
) -> dict[str, float]:
    """Return the deviations between two answers (as JSON) by kind of number; infinity if they do not match.

    Args:
        unsure: labels and boxes whose score is within this distance of the floor may be missing.
        floor: the lowest score that is reported; None for the lowest score of the two answers.
        then_floor: the lowest score of a next model's text that is reported.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if "runs" in expected:
            left, right = _pixels(expected), _pixels(actual)
            same = left.shape == right.shape
            return {"pixels": float(np.mean(left != right)) if same else float("inf")}
        same = expected.get("text") == actual.get("text")
        return {"score": abs(expected["score"] - actual["score"]) if same else float("inf")}
    if not isinstance(expected, list) or not isinstance(actual, list):
        return {"value": 0.0 if expected == actual else float("inf")}
    if any(isinstance(one, Mapping) for one in (*expected, *actual)):
        return _of_lists(expected, actual, unsure, floor, then_floor)
    if len(expected) != len(actual):
        return {"value": float("inf")}
    return {"value": max((abs(a - b) for a, b in zip(expected, actual, strict=True)), default=0.0)}


def _of_lists(
    expected: list[Any], actual: list[Any], unsure: float, floor: float | None, then_floor: float
) -> dict[str, float]:
    found = {"score": 0.0, "corner": 0.0}
    weakest = min(one["score"] for one in (*expected, *actual)) if floor is None else floor
    for some, others in ((expected, actual), (actual, expected)):
        for one in some:
            partner = _partner(one, others)
            if partner is None:
                after = one.get("then")
                near = isinstance(after, Mapping) and after.get("score", 1.0) <= then_floor + unsure
                if (one["score"] > weakest + unsure and not near) or (not others and floor is None):
                    return dict.fromkeys(found, float("inf"))
                continue
            found["score"] = max(found["score"], abs(one["score"] - partner["score"]))
            for mine, theirs in zip(_places(one), _places(partner), strict=True):
                found["corner"] = max(found["corner"], abs(mine - theirs))
            if "then" in one or "then" in partner:
                for key, value in deviations(one.get("then"), partner.get("then"), unsure).items():
                    found[key] = max(found.get(key, 0.0), value)
    return found


def _partner(one: Any, others: Sequence[Any]) -> Any | None:
    same = [other for other in others if other.get("index") == one.get("index")]
    if not _places(one) or not same:
        return same[0] if same else None
    mine, theirs = (np.asarray([_box(each) for each in some]) for some in ([one], same))
    overlap = boxes.iou(mine, theirs)[0]
    return same[int(overlap.argmax())] if overlap.max() > 0.5 else None


def _places(answer: Any) -> list[float]:
    """Return the numbers of an answer that are places in the picture."""
    if "corners" in answer:
        return [value for corner in answer["corners"] for value in corner]
    return [answer[key] for key in _CORNERS] if "x1" in answer else []


def _box(answer: Any) -> list[float]:
    """Return the upright box around an answer's places."""
    across, down = _places(answer)[0::2], _places(answer)[1::2]
    return [min(across), min(down), max(across), max(down)]


def _pixels(answer: Mapping[str, Any]) -> Any:
    kinds, lengths = zip(*answer["runs"], strict=True) if answer["runs"] else ((), ())
    return np.repeat(np.asarray(kinds, int), np.asarray(lengths, int))

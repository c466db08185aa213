"""Passes parts of a picture to the next models: cut out, straightened, turned, answered side by side."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from kedge_protocol.bundle.pipeline import Then
from kedge_protocol.errors import InputError
from kedge_targets.pipeline import pictures
from kedge_targets.pipeline.answers import Box, Label, Region, Text
from kedge_targets.pipeline.pictures import Pixels

Following = Callable[[Any], Any]
Part = TypeVar("Part", Box, Region)
_UPRIGHT = 1.5
"""A region that is higher than wide by this factor holds a line that runs upwards; it is turned to the left."""
_SIDE_BY_SIDE = 4
"""The maximum number of parts that are answered at the same time."""


def followed(found: Sequence[Part], pixels: Pixels, how: Then, other: Callable[[str], Following]) -> list[Part]:
    """Return boxes or regions with the next model's answers, less those that :attr:`Then.answer_floor` leaves out.

    Args:
        found: boxes or regions of a picture.
        pixels: the picture.
        other: returns another model by its name.
    """
    model = other(how.model)
    turning = other(how.turned_by) if how.turned_by else None

    def answer(part: Part) -> Part:
        cutting = _cut(pixels, part, how)
        if turning is not None:
            cutting = _turned(cutting, turning(cutting), how)
        return replace(part, then=model(cutting))

    passed = [part for part in found if isinstance(part, Region) or not how.labels or part.label in how.labels]
    passed = passed[: how.most]
    answers = {id(part): after for part, after in zip(passed, side_by_side(answer, passed), strict=True)}
    answered = [answers.get(id(part), part) for part in found]
    return [part for part in answered if not _is_blank(part.then, how.answer_floor)]


def side_by_side(work: Callable[[Part], Part], parts: Iterable[Part]) -> list[Part]:
    """Return the results of some work on each part, in order, with several at a time where there are cores for it:
    while one part is computed, the next is cut out."""
    waiting = list(parts)
    threads = min(len(waiting), len(os.sched_getaffinity(0)), _SIDE_BY_SIDE)
    if threads < 2:
        return [work(part) for part in waiting]
    with ThreadPoolExecutor(threads, "kedge-parts") as pool:
        return list(pool.map(work, waiting))


def _cut(pixels: Pixels, part: Box | Region, how: Then) -> Pixels:
    if isinstance(part, Box):
        return pictures.crop(pixels, np.asarray([part.x1, part.y1, part.x2, part.y2]), margin=how.margin)
    corners = np.asarray(part.corners)
    if how.margin:
        corners = corners + (corners - corners.mean(axis=0)) * 2 * how.margin
    cutting = pictures.cut(pixels, corners)
    upright = cutting.shape[0] >= _UPRIGHT * cutting.shape[1]
    return np.ascontiguousarray(np.rot90(cutting)) if upright else cutting


def _turned(cutting: Pixels, said: Any, how: Then) -> Pixels:
    """Turn a cutting back by the degrees that a classifier's best label states."""
    best = said[0] if isinstance(said, list) and said else None
    if not isinstance(best, Label) or best.name not in ("0", "90", "180", "270"):
        raise InputError(
            f"{how.turned_by!r} does not say by how many degrees a cutting is turned",
            where="[then] turned_by",
            remedy="Compile it as a classifier with the labels 0, 90, 180, 270, or some of them",
        )
    if best.score <= how.turned_above:
        return cutting
    # rot90 turns to the left, the label counts to the right.
    return np.ascontiguousarray(np.rot90(cutting, int(best.name) // 90))


def _is_blank(answer: Any, floor: float) -> bool:
    """Return whether an answer is a text that is left out; other answers never are."""
    return isinstance(answer, Text) and (answer.score < floor or (floor > 0 and not answer.text.strip()))

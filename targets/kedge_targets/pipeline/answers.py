"""A pipeline's answers: small typed objects, and their form as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Label:
    """A class with its score.

    Attributes:
        name: the class's name, or its number if the bundle has no labels.
        index: the class's index, from 0.
        score: the pipeline's score, usually a probability.
        by: name and version of the larger model that gave it; None if the bundle's own model did.
    """

    name: str
    index: int
    score: float
    by: str | None = None


@dataclass(frozen=True)
class Box:
    """An object in a picture, with its corners in pixels of the picture as displayed, x to the right and y downwards.

    Attributes:
        label, index, score: see :class:`Label`.
        then: the answer of the next model in the chain.
    """

    label: str
    index: int
    score: float
    x1: float
    y1: float
    x2: float
    y2: float
    then: Any = None


@dataclass(frozen=True)
class Region:
    """A region of text in a picture.

    Attributes:
        score: its mean probability, 0..1.
        corners: x and y of its corners in pixels of the picture as displayed, clockwise from the top left.
        then: the answer of the next model in the chain, usually a :class:`Text`.
    """

    score: float
    corners: tuple[tuple[float, float], ...]
    then: Any = None


@dataclass(frozen=True)
class Text:
    """A recognized text.

    Attributes:
        score: the mean probability of its characters, 0..1.
    """

    text: str
    score: float


@dataclass(frozen=True, eq=False)
class Vector:
    """An embedding.

    Attributes:
        values: float32 ``[D]``.
    """

    values: npt.NDArray[np.float32]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.values, dtype=dtype) if copy or dtype else self.values

    def __len__(self) -> int:
        return len(self.values)

    def similarity(self, other: Vector) -> float:
        """Return the cosine similarity to another vector; 0 if either has length zero."""
        left, right = self.values.astype(np.float64), other.values.astype(np.float64)
        lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
        return float(left @ right) / lengths if lengths else 0.0


@dataclass(frozen=True, eq=False)
class Segments:
    """A class for each pixel of a picture.

    Attributes:
        classes: uint8 or int32, height x width, of the picture as displayed.
        labels: the class names, by number.
    """

    classes: npt.NDArray[Any]
    labels: tuple[str, ...]


def to_json(answer: Any) -> Any:
    """Return an answer as plain data: objects, lists, strings, numbers; numbers keep the precision of float32.

    :class:`Segments` become runs: ``[class, length]`` pairs, row by row.
    """
    if isinstance(answer, Segments):
        flat = answer.classes.reshape(-1)
        edges = np.flatnonzero(np.diff(flat, prepend=flat[:1] - 1 if flat.size else flat)) if flat.size else flat
        lengths = np.diff(np.append(edges, flat.size))
        runs = [[int(flat[at]), int(length)] for at, length in zip(edges, lengths, strict=True)]
        return {"size": list(answer.classes.shape), "runs": runs, "labels": list(answer.labels)}
    if isinstance(answer, Vector):
        return [_short(value) for value in answer.values]
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        fields = {field.name: getattr(answer, field.name) for field in dataclasses.fields(answer)}
        return {name: to_json(value) for name, value in fields.items() if value is not None}
    if isinstance(answer, (list, tuple)):
        return [to_json(one) for one in answer]
    return _short(answer) if isinstance(answer, (float, np.floating)) else answer


def _short(value: Any) -> float:
    """Return the shortest decimal number that gives the same float32."""
    return float(str(np.float32(value)))

"""Pictures with objects to detect: shapes of several sizes and colours, drawn on crops of photos."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from tests.support import photos
from tests.support.detections import Found

Array = npt.NDArray[Any]

KINDS = ("disc", "square", "triangle", "star", "ring")
SIZE = 128
"""Of a picture, in pixels."""
_FINER = 3
"""Drawn so many times larger, then scaled down, so that edges are smooth."""
_SMALLEST, _LARGEST = 14.0, 64.0
_MOST = 8
_COVERED = 0.25
"""Overlap up to which objects may lie over one another."""


def pictures(count: int, *, seed: int) -> tuple[Array, list[Found]]:
    """Pictures and what is on them, of a seed.

    Returns:
        uint8 count x 3 x SIZE x SIZE, and for each its boxes and classes (scores 1).
    """
    rng = np.random.default_rng(seed)
    made = np.empty((count, 3, SIZE, SIZE), np.uint8)
    told = []
    for index in range(count):
        made[index], found = _picture(rng)
        told.append(found)
    return made, told


@lru_cache
def _backgrounds() -> list[Image.Image]:
    return list(photos.photos().values())


def _picture(rng: np.random.Generator) -> tuple[Array, Found]:
    pixels = photos.crop(_backgrounds()[rng.integers(len(_backgrounds()))], rng, SIZE).astype(np.float32)
    boxes: list[tuple[float, ...]] = []
    kinds: list[int] = []
    for _ in range(rng.integers(1, _MOST + 1)):
        size = float(np.exp(rng.uniform(np.log(_SMALLEST), np.log(_LARGEST))))
        x, y = (float(rng.uniform(size / 2, SIZE - size / 2)) for _ in range(2))
        kind = int(rng.integers(len(KINDS)))
        points = _outline(kind, x, y, size, float(rng.uniform(0, 2 * math.pi)))
        box = (*points.min(axis=0), *points.max(axis=0))
        if any(_covers(box, other) > _COVERED for other in boxes):
            continue
        _blend(pixels, points, hollow=KINDS[kind] == "ring", rng=rng)
        boxes.append(box)
        kinds.append(kind)
    pixels += rng.normal(0, rng.uniform(0, 12), pixels.shape)
    found = Found(np.asarray(boxes, np.float64).reshape(-1, 4), np.ones(len(kinds)), np.asarray(kinds, np.int64))
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8).transpose(2, 0, 1), found


def _blend(pixels: Array, points: Array, *, hollow: bool, rng: np.random.Generator) -> None:
    """Lay a shape of a random colour over the pixels, in place, in part transparent."""
    left, top = (int(v) for v in np.maximum(np.floor(points.min(axis=0)), 0))
    right, bottom = (int(v) for v in np.minimum(np.ceil(points.max(axis=0)), SIZE))
    mask = Image.new("L", ((right - left) * _FINER, (bottom - top) * _FINER))
    pen = ImageDraw.Draw(mask)
    outlines = [(points, 255)] + ([((points - points.mean(axis=0)) * 0.55 + points.mean(axis=0), 0)] if hollow else [])
    for outline, value in outlines:
        pen.polygon([tuple(point) for point in (outline - [left, top]) * _FINER], fill=value)
    small = np.asarray(mask.resize((right - left, bottom - top), Image.Resampling.BOX), np.float32)[..., None]
    share = small / 255 * rng.uniform(0.35, 0.85)
    part = pixels[top:bottom, left:right]
    part += share * (rng.uniform(0, 255, 3) - part)


def _outline(kind: int, x: float, y: float, size: float, turn: float) -> Array:
    """Corners, N x 2, of a shape that reaches ``size`` / 2 from its middle."""
    corners = {"disc": 40, "ring": 40, "square": 4, "triangle": 3, "star": 10}[KINDS[kind]]
    angles = turn + 2 * math.pi * np.arange(corners) / corners
    reach = np.full(corners, size / 2)
    if KINDS[kind] == "star":
        reach[1::2] *= 0.45
    return np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1)


def _covers(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """Intersection over the smaller area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return max(0.0, width) * max(0.0, height) / max(1e-9, min(areas))

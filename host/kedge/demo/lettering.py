"""Draws text for the demo's models and for its photo, in the font that Pillow carries."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import MissingDependencyError
from kedge_protocol.packages import pip_install

Array = npt.NDArray[Any]

ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ.-:"
"""A space follows as the last class of the reader."""
LINE_HEIGHT = 32
"""The height of a line as the models see it."""


@dataclass(frozen=True)
class Line:
    """A drawn line of text.

    Attributes:
        pixels: uint8 height x width x 3.
        middles: the middle of each character, as a fraction of the width.
    """

    text: str
    pixels: Array
    middles: tuple[float, ...]


def words(rng: np.random.Generator, most: int) -> str:
    """Return a text of at most ``most`` characters: random words."""
    text = ""
    while len(text) < most:
        word = "".join(rng.choice(list(ALPHABET), int(rng.integers(2, 8))))
        if text and len(text) + 1 + len(word) > most:
            break
        text = f"{text} {word}".strip()
    return text[:most]


def line(text: str, rng: np.random.Generator, *, blur: float = 0.6) -> Line:
    """Draw a line as a finder cuts it out: dark on light or light on dark, a little off and tilted, with noise."""
    from PIL import Image, ImageFilter

    font = _font(int(rng.integers(20, 34)))
    left, top, right, bottom = font.getbbox(text)
    margins = rng.uniform(0.05, 0.35, 4) * (bottom - top)
    width = int(right - left + margins[0] + margins[1])
    height = int(bottom - top + margins[2] + margins[3])
    picture = _on(text, (width, height), (margins[0] - left, margins[2] - top), font, rng)
    angle, ground = float(rng.uniform(-1.5, 1.5)), picture.getpixel((0, 0))
    picture = picture.rotate(angle, Image.Resampling.BILINEAR, fillcolor=ground)
    picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, blur))))
    ends = [font.getlength(text[: place + 1]) for place in range(len(text))]
    begins = [0.0, *ends[:-1]]
    middles = [(begin + end) / 2 + margins[0] - left for begin, end in zip(begins, ends, strict=True)]
    return Line(text, _noisy(np.asarray(picture), rng), tuple(middle / width for middle in middles))


def page(
    texts: Sequence[str], rng: np.random.Generator, *, size: tuple[int, int], angle: float = 0.0
) -> tuple[Array, list[Array]]:
    """Draw a page of lines below each other.

    Returns:
        uint8 height x width x 3, and for each line its four corners, clockwise from the top left.
    """
    from PIL import Image, ImageDraw

    light = rng.random() < 0.7
    ground, ink = _colours(rng, light=light)
    picture = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(picture)
    boxes = []
    y = float(rng.uniform(0.03, 0.12) * size[1])
    for text in texts:
        font = _font(int(rng.integers(18, 30)))
        left, top, right, bottom = font.getbbox(text)
        x = float(rng.uniform(6, max(7.0, size[0] - right - 6)))
        if y + bottom > size[1] - 4:
            break
        draw.text((x, y), text, fill=ink, font=font)
        box = np.asarray([[left, top], [right, top], [right, bottom], [left, bottom]])
        boxes.append(box + np.asarray([x, y]))
        y += bottom + float(rng.uniform(8, 30))
    if angle:
        picture = picture.rotate(angle, Image.Resampling.BICUBIC, fillcolor=ground)
        turn, middle = np.deg2rad(angle), np.asarray(size) / 2
        matrix = np.asarray([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        boxes = [(box - middle) @ matrix + middle for box in boxes]
    return _noisy(np.asarray(picture), rng), boxes


def core(box: Array, share: float) -> Array:
    """Return the corners of a line's core: each side moved inwards by a share of the line's height."""
    along = (box[1] - box[0]) / np.linalg.norm(box[1] - box[0])
    down = (box[3] - box[0]) / np.linalg.norm(box[3] - box[0])
    inwards = share * np.linalg.norm(box[3] - box[0])
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return np.asarray([corner + inwards * (a * along + d * down) for corner, (a, d) in zip(box, signs, strict=True)])


def _on(text: str, size: tuple[int, int], place: tuple[float, float], font: Any, rng: np.random.Generator) -> Any:
    from PIL import Image, ImageDraw

    ground, ink = _colours(rng, light=rng.random() < 0.7)
    picture = Image.new("RGB", size, ground)
    ImageDraw.Draw(picture).text(place, text, fill=ink, font=font)
    return picture


def _colours(rng: np.random.Generator, *, light: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bright = tuple(int(value) for value in rng.integers(170, 256, 3))
    dark = tuple(int(value) for value in rng.integers(0, 90, 3))
    return (bright, dark) if light else (dark, bright)


def _noisy(pixels: Array, rng: np.random.Generator) -> Array:
    return np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)


@functools.lru_cache(maxsize=64)
def _font(size: int) -> Any:
    try:
        from PIL import ImageFont
    except ImportError as error:
        raise MissingDependencyError("the demo draws with Pillow", remedy=pip_install("host,dev")) from error
    return ImageFont.load_default(size)

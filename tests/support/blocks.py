"""Pages with lines of coloured blocks, as text for models that are drawn: a black block begins each line, and red,
green and blue ones follow. One model finds the lines, one says which way up a line is, and one reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper
from PIL import Image

from tests.support.raw_data import saved

Array = npt.NDArray[Any]

LETTERS = "|rgb"
"""What the blocks are read as."""
BLOCK, GAP, HEIGHT = 14, 10, 20
_INK = {"|": (0, 0, 0), "r": (255, 0, 0), "g": (0, 255, 0), "b": (0, 0, 255)}
_READ_HEIGHT, _DIRECTION_WIDTH = 16, 160
_BEGIN = 24
"""Columns of a line in which the black block begins."""
_BRIDGE = 15
"""Pixels by which the finder's ink spreads sideways, more than a gap."""


def line(text: str) -> Image.Image:
    """The blocks of one line on white; the black block is added."""
    pixels = np.full((HEIGHT, (BLOCK + GAP) * (len(text) + 1) - GAP, 3), 255, np.uint8)
    for place, letter in enumerate("|" + text):
        pixels[:, place * (BLOCK + GAP) : place * (BLOCK + GAP) + BLOCK] = _INK[letter]
    return Image.fromarray(pixels)


def page(lines: Sequence[tuple[int, int, str]], *, size: tuple[int, int] = (320, 256), angle: float = 0) -> Image.Image:
    """A white page with lines at (x, y), turned to the left by some degrees about its middle."""
    made = Image.new("RGB", size, (255, 255, 255))
    for x, y, text in lines:
        made.paste(line(text), (x, y))
    return made.rotate(angle, Image.Resampling.BICUBIC, fillcolor=(255, 255, 255))


def pages(folder: Path, count: int = 10) -> Path:
    """A folder of pages to calibrate and evaluate with."""
    folder.mkdir()
    rng = np.random.default_rng(4)
    for number in range(count):
        texts = ["".join(rng.choice(list("rgb"), int(rng.integers(2, 6)))) for _ in range(3)]
        lines = [(20 + 10 * number, 30 + 70 * place, text) for place, text in enumerate(texts)]
        page(lines).save(folder / f"{number}.png")
    return folder


def finder(path: Path) -> Path:
    """``x`` N x 3 x H x W in -1..1, height and width free, to ``map`` N x 1 x H x W: where something is not white."""
    nodes = [
        helper.make_node("ReduceMin", ["x"], ["darkest"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["darkest", "steep"], ["ink"]),
        helper.make_node(
            "MaxPool", ["ink"], ["joined"], kernel_shape=[1, _BRIDGE], pads=[0, _BRIDGE // 2, 0, _BRIDGE // 2]
        ),
        helper.make_node("Sigmoid", ["joined"], ["map"]),
    ]
    weights = {"steep": np.asarray(-8, np.float32)}
    inputs = {"x": (TensorProto.FLOAT, ["N", 3, "H", "W"])}
    return saved(path, nodes, inputs, {"map": ["N", 1, "H", "W"]}, weights)


def direction(path: Path) -> Path:
    """``x`` N x 3 x 16 x 160 to ``scores`` N x 2 (upright, upside down): whether black is at the left end."""
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["brightest"], axes=[1], keepdims=0),
        helper.make_node("ReduceMean", ["brightest"], ["columns"], axes=[1], keepdims=0),
        helper.make_node("Neg", ["columns"], ["black"]),
        helper.make_node("Slice", ["black", "from", "to", "axis"], ["left"]),
        helper.make_node("ReduceMax", ["left"], ["begins"], axes=[1], keepdims=1),
        helper.make_node("Gemm", ["begins", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    weights: dict[str, Array] = {
        "from": np.asarray([0], np.int64),
        "to": np.asarray([_BEGIN], np.int64),
        "axis": np.asarray([1], np.int64),
        "w": np.asarray([[6, -6]], np.float32),
    }
    inputs = {"x": (TensorProto.FLOAT, ["N", 3, _READ_HEIGHT, _DIRECTION_WIDTH])}
    return saved(path, nodes, inputs, {"scores": ["N", 2]}, weights)


def reader(path: Path) -> Path:
    """``x`` N x 3 x 16 x W, the width free, in the order of PaddleOCR's channels (blue, green, red), to ``steps``
    N x W/4 x 5: probabilities of the blank and of :data:`LETTERS`."""
    white, rows = np.asarray([1, 1, 1]), [[-1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, -1, -1]]
    nodes = [
        helper.make_node("AveragePool", ["x"], ["columns"], kernel_shape=[_READ_HEIGHT, 4], strides=[_READ_HEIGHT, 4]),
        helper.make_node("Conv", ["columns", "w", "b"], ["seen"]),
        helper.make_node("Squeeze", ["seen", "axis"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("Softmax", ["turned"], ["steps"], axis=2),
    ]
    weights: dict[str, Array] = {
        "w": 4 * np.asarray([white, *rows], np.float32).reshape(5, 3, 1, 1),
        "b": np.asarray([4, 0, 0, 0, 0], np.float32),
        "axis": np.asarray([2], np.int64),
    }
    inputs = {"x": (TensorProto.FLOAT, ["N", 3, _READ_HEIGHT, "W"])}
    return saved(path, nodes, inputs, {"steps": ["N", "T", 5]}, weights)

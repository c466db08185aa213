"""Folders of drawn pictures, sounds and texts as people have them, and tiny models that answer them rightly."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

Array = npt.NDArray[Any]

COLOURS = ("red", "green", "blue")
SIZE = 32
RATE = 8000


def saved(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, list[Any]],
    weights: dict[str, Array],
    metadata: dict[str, str] | None = None,
) -> Path:
    """Write an ONNX file; inputs are (element type, shape) by name."""
    graph = helper.make_graph(
        list(nodes),
        "drawn",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    for key, value in (metadata or {}).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def colour_model(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """``pixels`` N x 3 x 32 x 32 to ``scores`` N x 3: the softmax of the means of red, green and blue."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    inputs = {"pixels": (TensorProto.FLOAT, ["N", 3, SIZE, SIZE])}
    weights = {"w": (np.eye(3) * 4).astype(np.float32)}
    return saved(path, nodes, inputs, {"scores": ["N", 3]}, weights, metadata)


def coloured(kind: int, rng: np.random.Generator) -> Array:
    """A noisy picture of 24 to 90 pixels a side in which one colour is strongest: uint8 height x width x 3."""
    sides = rng.integers(24, 90, 2)
    pixels = rng.integers(0, 90, (int(sides[0]), int(sides[1]), 3))
    pixels[..., kind] += 120
    return pixels.astype(np.uint8)


def class_folders(folder: Path, count: int = 8, *, seed: int = 0) -> Path:
    """``folder/{red,green,blue}/N.{jpg,png}``."""
    rng = np.random.default_rng(seed)
    for kind, name in enumerate(COLOURS):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(coloured(kind, rng)).save(folder / name / f"{number}.{('jpg', 'png')[number % 2]}")
    return folder


def write_wav(path: Path, samples: Array, rate: int = RATE, *, channels: int = 1) -> Path:
    """16-bit PCM of samples in -1..1."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(rate)
        whole = np.clip(np.rint(samples * 32767), -32768, 32767).astype("<i2")
        file.writeframes(np.repeat(whole, channels).tobytes())
    return path

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


def box_model(path: Path, metadata: dict[str, str] | None = None) -> Path:
    """A detector with an anchor-free head: ``images`` N x 3 x 32 x 64 to ``output0`` N x (4 + 3) x 8. Each of the 8
    cells of 16 x 16 pixels is an anchor with a box of 20 x 20 pixels in its middle; its scores are the means of red,
    green and blue of the cell, steepened."""
    rows, columns = 2, 4
    middles = [[16 * column + 8, 16 * row + 8] for row in range(rows) for column in range(columns)]
    boxes = np.concatenate([np.asarray(middles), np.full((8, 2), 20)], axis=1).T.astype(np.float32)[None]
    nodes = [
        helper.make_node("AveragePool", ["images"], ["cells"], kernel_shape=[16, 16], strides=[16, 16]),
        helper.make_node("Reshape", ["cells", "flat"], ["means"]),
        helper.make_node("Mul", ["means", "steep"], ["steeper"]),
        helper.make_node("Add", ["steeper", "shift"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
        helper.make_node("ReduceMean", ["probabilities"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["mean", "nothing"], ["zeros"]),
        helper.make_node("Add", ["zeros", "boxes"], ["placed"]),
        helper.make_node("Concat", ["placed", "probabilities"], ["output0"], axis=1),
    ]
    weights = {
        "flat": np.asarray([0, 3, 8], np.int64),
        "steep": np.asarray(14, np.float32),
        "shift": np.asarray(-7, np.float32),
        "nothing": np.asarray(0, np.float32),
        "boxes": boxes,
    }
    inputs = {"images": (TensorProto.FLOAT, ["N", 3, 32, 64])}
    return saved(path, nodes, inputs, {"output0": ["N", 7, 8]}, weights, metadata)


ULTRALYTICS = {
    "task": "detect",
    "stride": "16",
    "imgsz": "[32, 64]",
    "names": str(dict(enumerate(COLOURS))),
}
"""What an export of Ultralytics says of itself."""


def boxed(rng: np.random.Generator, size: tuple[int, int] = (128, 64)) -> tuple[Array, list[list[float]]]:
    """A dark picture with bright squares on some cells of a grid, and their classes and boxes (class, x1, y1, x2, y2 as
    shares of the picture)."""
    width, height = size
    pixels = rng.integers(0, 40, (height, width, 3)).astype(np.uint8)
    rows = []
    for cell in sorted(rng.choice(8, 3, replace=False)):
        kind = int(rng.integers(3))
        left, top = (cell % 4) * width // 4, (cell // 4) * height // 2
        pixels[top : top + height // 2, left : left + width // 4, kind] = 235
        rows.append([float(kind), left / width, top / height, (left + width / 4) / width, (top + height / 2) / height])
    return pixels, rows


def tone_model(path: Path, samples: int = RATE) -> Path:
    """``sound`` N x samples to ``scores`` N x 2: the energy of differences tells a high tone from a low one."""
    nodes = [
        helper.make_node("Slice", ["sound", "one", "end", "axis"], ["later"]),
        helper.make_node("Slice", ["sound", "zero", "minus", "axis"], ["earlier"]),
        helper.make_node("Sub", ["later", "earlier"], ["steps"]),
        helper.make_node("Abs", ["steps"], ["sizes"]),
        helper.make_node("ReduceMean", ["sizes"], ["mean"], axes=[1], keepdims=1),
        helper.make_node("Gemm", ["mean", "w", "b"], ["scores"]),
    ]
    weights = {
        "one": np.asarray([1], np.int64),
        "zero": np.asarray([0], np.int64),
        "minus": np.asarray([-1], np.int64),
        "end": np.asarray([1 << 30], np.int64),
        "axis": np.asarray([1], np.int64),
        "w": np.asarray([[40, -40]], np.float32),
        "b": np.asarray([-10, 10], np.float32),
    }
    inputs = {"sound": (TensorProto.FLOAT, ["N", samples])}
    return saved(path, nodes, inputs, {"scores": ["N", 2]}, weights)


def tones(folder: Path, count: int = 10) -> Path:
    """Wav files of high and low tones, at 8 and 16 kHz, mono and stereo, with ``labels.csv``; ``folder``."""
    folder.mkdir(parents=True)
    lines = ["file,label"]
    for number in range(count):
        high, rate = number % 2 == 0, (RATE, 2 * RATE)[number // 2 % 2]
        times = np.arange(rate) / rate
        wave_ = 0.5 * np.sin(2 * np.pi * ((2000, 200)[number % 2] + 10 * number) * times)
        write_wav(folder / f"{number}.wav", wave_, rate, channels=1 + number % 3 // 2)
        lines.append(f"{number}.wav,{'high' if high else 'low'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


WORDS = ("good", "fine", "bad", "poor", "the", "day", "is")


def word_model(folder: Path) -> Path:
    """``input_ids`` and ``attention_mask`` N x T, T free, to ``scores`` N x 2: good words against bad ones; its
    ``tokenizer.json`` (WordPiece) lies beside it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: number for number, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    table = np.zeros((len(vocabulary), 2), np.float32)
    table[[vocabulary["good"], vocabulary["fine"]], 1] = 3
    table[[vocabulary["bad"], vocabulary["poor"]], 0] = 3
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["shown"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["shown", "last"], ["wide"]),
        helper.make_node("Mul", ["rows", "wide"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "time"], ["scores"], keepdims=0),
    ]
    weights = {"table": table, "last": np.asarray([2], np.int64), "time": np.asarray([1], np.int64)}
    inputs = {name: (TensorProto.INT64, ["N", "T"]) for name in ("input_ids", "attention_mask")}
    return saved(folder / "words.onnx", nodes, inputs, {"scores": ["N", 2]}, weights)

"""Models that others published, with inputs for them: to calibrate with, to judge by, and fresh ones that no
compilation has seen."""

from __future__ import annotations

import itertools
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from PIL import Image, ImageDraw, ImageFont

from tests.support import detections, foreign, minilm, photos

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

CALIBRATION, EVALUATION, FRESH = 64, 96, 200
"""Samples of each kind."""


@dataclass(frozen=True)
class Foreign:
    """One model.

    Attributes:
        path: of its ONNX file.
        feeds: (how many, seed) → inputs; no two seeds give the same sample.
        parts: of each output's channels (axis 1), which are judged apart: ranges of indices; empty for the whole.
        raw: what ``Model.raw`` takes, as multiples of the model's own inputs: 255 where a pipeline normalizes pictures.
    """

    path: Path
    feeds: Callable[[int, int], Feeds]
    parts: tuple[tuple[int, int], ...] = ()
    raw: float = 1.0

    def answers(self, feeds: Feeds) -> list[Array]:
        """The float model's outputs, one sample at a time."""
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(self.path), settings, providers=["CPUExecutionProvider"])
        return joined([session.run(None, feed) for feed in singles(feeds)])


def singles(feeds: Feeds) -> Iterator[Feeds]:
    """One sample after the other."""
    for row in range(len(next(iter(feeds.values())))):
        yield {name: array[row : row + 1] for name, array in feeds.items()}


def joined(rows: list[list[Array]]) -> list[Array]:
    """Outputs of single samples, together."""
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


def per_sample(metric: str, want: list[Array], got: list[Array], parts: tuple[tuple[int, int], ...]) -> Array:
    """N: what a metric is the mean of: the share of equal answers for ``agreement`` (1 or 0, but for lines of text and
    other outputs with an answer for each position), else the cosine of the part that suffers most."""
    if metric == "agreement":
        return same_answers(want, got).mean(axis=1)
    columns = []
    for wanted, mine in zip(want, got, strict=True):
        for start, stop in parts or ((0, wanted.shape[1]),):
            left, right = (one[:, start:stop].reshape(len(one), -1).astype(np.float64) for one in (wanted, mine))
            norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
            columns.append((left * right).sum(axis=1) / np.where(norms > 0, norms, 1))
    return min(columns, key=lambda one: float(one.mean()))


def same_answers(want: list[Array], got: list[Array]) -> Array:
    """Whether the first output's answers are the same: N x positions, 1 or 0."""
    same = np.asarray(want[0].argmax(axis=-1) == got[0].argmax(axis=-1), np.float64)
    return same.reshape(len(same), -1)


def models(scratch: Path) -> Mapping[str, Callable[[], Foreign]]:
    """Name → the model, fetched at the first need.

    Args:
        scratch: for what is exported.
    """
    ocr = foreign.package("rapidocr") / "rapidocr" / "models"
    return {
        "magika": lambda: Foreign(
            foreign.package("magika") / "magika" / "models" / "standard_v3_3" / "model.onnx", _bytes
        ),
        "rapidocr-classifier": lambda: Foreign(
            ocr / "ch_ppocr_mobile_v2.0_cls_mobile.onnx", lambda n, seed: _lines(n, seed, 192, turned=True)
        ),
        "rapidocr-detector": lambda: Foreign(ocr / "PP-OCRv6_det_small.onnx", _pages),
        "rapidocr-recognizer": lambda: Foreign(
            ocr / "PP-OCRv6_rec_small.onnx", lambda n, seed: _lines(n, seed, 160, turned=False)
        ),
        "minilm": lambda: _minilm(scratch),
        "nudenet": nudenet,
    }


def nudenet() -> Foreign:
    """A YOLOv8n of 320 pixels; rows 0-3 are boxes in pixels, the others scores."""
    path = foreign.package("nudenet") / "nudenet" / "320n.onnx"
    return Foreign(
        path, lambda n, seed: {"images": photos.crops(n, 320, seed=seed)}, parts=((0, 4), (4, 22)), raw=255.0
    )


def found(outputs: Array) -> list[detections.Found]:
    """The detections of each picture."""
    return [detections.decoded(one) for one in outputs]


def _minilm(scratch: Path) -> Foreign:
    path = scratch / "minilm.onnx"
    if not path.is_file():
        minilm.export(path)
    pool = itertools.islice(itertools.cycle([*minilm.held_out(2000)]), 4000)
    sentences = list(pool)

    def feeds(count: int, seed: int) -> Feeds:
        return minilm.feed(sentences[seed * 500 : seed * 500 + count], 32)

    return Foreign(path, feeds)


def _bytes(count: int, seed: int) -> Feeds:
    """Beginnings and ends of files of Python's library, of numpy and of ONNX Runtime, as magika takes them."""
    roots = [Path(sysconfig.get_paths()["stdlib"]), Path(np.__file__).parent, Path(onnxruntime.__file__).parent]
    by_kind: dict[str, list[Path]] = {}
    for root in roots:
        for path in sorted(root.glob("**/*.*")):
            if "site-packages" not in path.relative_to(root).parts and path.is_file():
                by_kind.setdefault(path.suffix, []).append(path)
    rng = np.random.default_rng(seed)
    rows = np.full((count, 2048), 256, np.int32)
    full = [paths for _, paths in sorted(by_kind.items()) if len(paths) > 16]
    for row in range(count):
        paths = full[row % len(full)]
        # Seeds take turns, so that no file is in two of them.
        path = paths[(int(rng.integers(len(paths) // 8)) * 8 + seed % 8) % len(paths)]
        content = np.frombuffer(path.read_bytes(), np.uint8)
        first, last = content[:1024], content[-1024:]
        rows[row, : len(first)] = first
        rows[row, 2048 - len(last) :] = last
    return {"bytes": rows}


_WORDS = (
    "Invoice", "No.", "2026", "TOTAL", "Street", "Exit", "Gate", "14:32", "Platform", "7", "open", "closed", "EUR",
    "19.90", "Kedge", "edge", "SALE", "50%", "Main", "Square", "water", "Danger", "High", "Voltage", "Room", "101",
)  # fmt: skip


def _lines(count: int, seed: int, width: int, *, turned: bool) -> Feeds:
    """Lines of text 48 pixels high, some of them upside down; float32 in -1..1."""
    rng = np.random.default_rng(seed)
    made = np.empty((count, 3, 48, width), np.float32)
    for row in range(count):
        picture = _written(rng, width, 48, lines=1)
        if turned and rng.random() < 0.5:
            picture = picture.rotate(180)
        made[row] = np.asarray(picture, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return {"x": made}


def _pages(count: int, seed: int) -> Feeds:
    """Photos with a few lines of text on them, 160 x 160; normalized as PaddleOCR does."""
    rng = np.random.default_rng(seed)
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    made = np.empty((count, 3, 160, 160), np.float32)
    for row in range(count):
        pixels = np.asarray(_written(rng, 160, 160, lines=3), np.float32) / 255
        made[row] = ((pixels - mean) / deviation).transpose(2, 0, 1)
    return {"x": made}


def _written(rng: np.random.Generator, width: int, height: int, *, lines: int) -> Image.Image:
    shots = list(photos.photos().values())
    ground = photos.crop(shots[rng.integers(len(shots))], rng, max(width, height))[:height, :width]
    faint = rng.uniform(0.1, 0.5)
    base = rng.uniform(0, 255, 3)
    picture = Image.fromarray(np.rint(base + faint * (ground - base)).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    ink = tuple(int(v) for v in np.where(base > 127, rng.uniform(0, 60, 3), rng.uniform(195, 255, 3)))
    for line in range(lines):
        text = " ".join(rng.choice(_WORDS, rng.integers(1, 4)))
        size = float(rng.uniform(0.45, 0.75) * height / lines)
        place = float(rng.uniform(2, 0.2 * width)), line * height / lines + float(rng.uniform(0, 0.2 * height / lines))
        pen.text(place, text, fill=ink, font=ImageFont.load_default(size))
    return picture


def keep(row: dict[str, Any]) -> None:
    """Add a row to the table that ``make zoo`` prints (``zoo.json`` among what is kept)."""
    table = foreign.folder() / "zoo.json"
    rows = json.loads(table.read_text()) if table.is_file() else {}
    rows[f"{row['model']} {row['target']}"] = row
    table.write_text(json.dumps(rows, indent=1))

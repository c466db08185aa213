"""What overlapping gains: `Model.stream` beside a loop of calls, and parts of a picture side by side beside one after
the other. The model runs with the
threads that its runtime takes; pictures are JPEG files of 1280 x 960. Wall-clock time of the least disturbed of
several turns: it needs two idle cores."""

from __future__ import annotations

import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper
from PIL import Image
from tests.support import raw_data

import kedge
from benchmarks.harness import Result, turns, undisturbed
from kedge_agent import Model
from kedge_targets.pipeline import chains

_SIDE = 224
_TURNS = 9
_PICTURES = 12


def network(path: Path, channels: int) -> Path:
    """A classifier of pictures, most of it one convolution of ``channels`` by 64 on 112 x 112 places."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["pixels", "a"], ["first"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["first"], ["bent"]),
        helper.make_node("Conv", ["bent", "b"], ["second"], pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["second"], ["mean"]),
        helper.make_node("Flatten", ["mean"], ["flat"]),
        helper.make_node("Gemm", ["flat", "c"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["scores"], axis=1),
    ]
    weights = {
        "a": rng.normal(0, 0.2, (channels, 3, 3, 3)).astype(np.float32),
        "b": rng.normal(0, 0.05, (64, channels, 3, 3)).astype(np.float32),
        "c": rng.normal(0, 0.5, (64, 3)).astype(np.float32),
    }
    inputs = {"pixels": (TensorProto.FLOAT, ["N", 3, _SIDE, _SIDE])}
    return raw_data.saved(path, nodes, inputs, {"scores": ["N", 3]}, weights)


def run() -> list[Result]:
    """Compile, run in turns."""
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as scratch:
        folder = Path(scratch)
        pictures = raw_data.class_folders(folder / "data", 4)
        results = [_stream(folder, pictures, channels) for channels in (16, 64)]
        return [*results, _parts(folder)]


def compiled(model: Path, name: str, pictures: Path, **how: Any) -> Path:
    """A release for this machine, in float32."""
    out = model.parent / name
    kedge.compile(
        model, name=name, version="1", targets=["generic-cpu"], calibration=pictures, evaluation=pictures, out=out,
        quantize="precision=float32", max_drop=1.0, **how,
    )  # fmt: skip
    return out


def _stream(folder: Path, pictures: Path, channels: int) -> Result:
    release = compiled(network(folder / f"{channels}.onnx", channels), f"c{channels}", pictures, task="classification")
    items = [_jpeg(seed) for seed in range(_PICTURES)]
    with Model(release, target="generic-cpu") as model:
        single, streamed = turns(
            _TURNS, _timed(lambda: [model(one) for one in items]), _timed(lambda: list(model.stream(items)))
        )
        bare = undisturbed([_timed(lambda: model.raw(np.zeros((3, _SIDE, _SIDE), np.uint8)))() for _ in range(20)])
    return Result(
        name=f"stream, model of {1000 * bare:.0f} ms",
        span="JPEG of 1280 x 960 to labels",
        unit="ms a picture",
        kedge=1000 * undisturbed(streamed) / _PICTURES,
        baseline=1000 * undisturbed(single) / _PICTURES,
        against="a loop of calls",
        goal="not slower",
        met=undisturbed(streamed) <= 1.05 * undisturbed(single),
    )


def _parts(folder: Path) -> Result:
    pictures = folder / "boxed"
    pictures.mkdir()
    for seed in range(10):
        Image.fromarray(raw_data.boxed(np.random.default_rng(seed))[0]).save(pictures / f"{seed}.png")
    pipeline = folder / "boxes.toml"
    pipeline.write_text('task = "detection"\n[then]\nmodel = "c64"\n')
    labels = folder / "labels.txt"
    labels.write_text("\n".join(raw_data.COLOURS))
    release = compiled(raw_data.box_model(folder / "boxes.onnx"), "boxes", pictures, pipeline=pipeline, labels=labels)
    page = raw_data.boxed(np.random.default_rng(0), (640, 320))[0]
    with (
        Model(folder / "c64", target="generic-cpu") as other,
        Model(release, target="generic-cpu", others={"c64": other}) as model,
    ):
        found = len(model(page))
        one, several = turns(_TURNS, _timed(lambda: _one_by_one(model, page)), _timed(lambda: model(page)))
    return Result(
        name=f"{found} parts of a picture",
        span="pixels to boxes to labels",
        unit="ms a picture",
        kedge=1000 * undisturbed(several),
        baseline=1000 * undisturbed(one),
        against="one part after the other",
        goal="not slower",
        met=undisturbed(several) <= 1.05 * undisturbed(one),
    )


def _one_by_one(model: Model, page: Any) -> None:
    before, chains._SIDE_BY_SIDE = chains._SIDE_BY_SIDE, 1
    try:
        model(page)
    finally:
        chains._SIDE_BY_SIDE = before


def _jpeg(seed: int) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((1280, 960), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    return measure

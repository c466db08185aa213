"""Models that others published, on three targets: what is true on fresh inputs beside what the report says.

Marked ``zoo``: ``make zoo`` runs them alone. Each row of the table is kept in ``.zoo/zoo.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from tests.support import detections, photos, zoo
from tests.support.zoo import CALIBRATION, EVALUATION, FRESH, Foreign

import kedge
import kedge_agent
from kedge_protocol.errors import KedgeError

Array = npt.NDArray[Any]

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(7200)]

TARGETS = ("generic-cpu", "intel-cpu", "rpi4")
NAMES = ("magika", "rapidocr-classifier", "rapidocr-detector", "rapidocr-recognizer", "minilm", "nudenet")
_NO_FINER = {"agreement": 1 / EVALUATION}
"""What a figure of so many samples cannot tell; of others, what floats do."""


HOSTS = ("generic-cpu", "intel-cpu")
"""Targets whose bundles this machine runs as the device does."""


def compiled(model: Foreign, target: str, folder: Path, **more: Any) -> tuple[dict[str, Any], Path] | KedgeError:
    """The report's line of the bundle and where it lies; or why there is none."""
    out = folder / ("OUT" if not more else "PLAIN")
    for role, count, seed in (("calibration", CALIBRATION, 0), ("evaluation", EVALUATION, 1)):
        np.savez(folder / f"{role}.npz", **model.feeds(count, seed))
    try:
        kedge.compile(
            model.path,
            name="zoo",
            version="1",
            targets=[target],
            calibration=folder / "calibration.npz",
            evaluation=folder / "evaluation.npz",
            out=out,
            **more,
        )
    except KedgeError as error:
        return error
    report = json.loads((out / "report.json").read_text())
    return {"metric": report["metric"], **report["bundles"][0]}, out


def scaled(model: Foreign, feed: zoo.Feeds) -> zoo.Feeds:
    """Inputs as ``Model.raw`` takes them."""
    return feed if model.raw == 1 else {name: array * np.float32(model.raw) for name, array in feed.items()}


def answers(foreign: Foreign, bundle: Path, target: str, feeds: zoo.Feeds) -> list[Array]:
    """Of the packed bundle, one sample at a time."""
    model = kedge_agent.Model(bundle, target=target)
    rows = []
    for feed in zoo.singles(feeds):
        got = model.raw(scaled(foreign, feed))
        rows.append(list(got) if isinstance(got, tuple | list) else [got])
    return zoo.joined(rows)


def in_turns(model: Foreign, bundle: Path, target: str, feeds: zoo.Feeds, rounds: int = 40) -> tuple[float, float]:
    """Milliseconds of processor time for one sample: float ONNX Runtime, the bundle; medians of turns, one thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(model.path), settings, providers=["CPUExecutionProvider"])
    packed = kedge_agent.Model(bundle, target=target)
    ways = (lambda feed: session.run(None, feed), packed.raw)
    took: tuple[list[float], list[float]] = ([], [])
    every = [(feed, scaled(model, feed)) for feed in zoo.singles(feeds)]
    for number in range(rounds):
        for way, times, feed in zip(ways, took, every[number % len(every)], strict=True):
            start = time.process_time()
            way(feed)
            times.append(time.process_time() - start)
    return 1e3 * float(np.median(took[0][4:])), 1e3 * float(np.median(took[1][4:]))


def spread_of(line: dict[str, Any], *, worse: bool) -> float:
    """How far the report's own interval reaches from its figure, and as much as fresh samples spread besides."""
    interval = line["interval"]
    reach = interval["high"] - line["drop"] if worse else line["drop"] - interval["low"]
    return float(reach) * float(np.sqrt(1 + EVALUATION / FRESH))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", NAMES)
def test_what_the_report_says_is_true_on_fresh_inputs(name: str, target: str, tmp_path: Path) -> None:
    model = zoo.models(tmp_path)[name]()
    row: dict[str, Any] = {"model": name, "target": target}
    found = compiled(model, target, tmp_path)
    if isinstance(found, KedgeError):
        zoo.keep(row | {"refused": str(found)})
        assert found.remedy
        return
    line, bundle = found
    fresh = model.feeds(FRESH, 2)
    want, got = model.answers(fresh), answers(model, bundle, target, fresh)
    metric = line["metric"]
    each = zoo.per_sample(metric, want, got, model.parts)
    truth, spread = float(each.mean()), spread_of(line, worse=float(each.mean()) < line["value"])
    wrong = abs(truth - line["value"]) > max(spread, _NO_FINER.get(metric, 1e-4))
    float_ms, bundle_ms = in_turns(model, bundle, target, fresh)
    row |= {
        "label": line["label"],
        "precision": line["precision"],
        "metric": metric,
        "reported": line["value"],
        "true": truth,
        "spread": spread,
        "wrong": wrong,
        "size": line["size_ratio"],
        "float ms": float_ms,
        "bundle ms": bundle_ms,
    }
    if metric == "agreement":
        row["whole samples"] = float(zoo.same_answers(want, got).min(axis=1).mean())
    zoo.keep(row)
    assert not wrong, row


@pytest.mark.parametrize("target", TARGETS)
def test_a_detector_keeps_its_detections(target: str, tmp_path: Path) -> None:
    model = zoo.nudenet()
    found = compiled(model, target, tmp_path)
    assert not isinstance(found, KedgeError), found
    line, bundle = found
    # Photos of people hold most of what this model knows; the others show what it must not find.
    people = ("astronaut.png", "camera.png", "color.png", "coffee.png", "clock_motion.png", "moon.png")
    fresh = {"images": np.concatenate([photos.crops(168, 320, seed=21), photos.crops(84, 320, seed=22, names=people)])}
    want = zoo.found(model.answers(fresh)[0])
    got = zoo.found(answers(model, bundle, target, fresh)[0])
    assert sum(len(one.boxes) for one in want) >= 100
    agreement = detections.f1(want, got)
    float_ms, bundle_ms = in_turns(model, bundle, target, fresh)
    if target not in HOSTS:  # its own runtime's float is what it must not be slower than
        plain = compiled(model, target, tmp_path, quantize="precision=float32", max_drop=1.0)
        assert not isinstance(plain, KedgeError), plain
        _, float_ms = in_turns(model, plain[1], target, fresh)
    zoo.keep(
        {
            "model": "nudenet, detections",
            "target": target,
            "label": line["label"],
            "boxes": sum(len(one.boxes) for one in want),
            "F1": agreement,
            "size": line["size_ratio"],
            "float ms": float_ms,
            "bundle ms": bundle_ms,
        }
    )
    assert agreement >= 0.95
    assert line["size_ratio"] <= 0.35
    assert bundle_ms <= float_ms

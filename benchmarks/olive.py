"""``kedge compile`` beside Olive: static int8 of the same model with the same data, each with its own evaluation.

Olive lives in an environment of its own, which is made here once. ``CI=1`` switches off its telemetry, which would
wait for a server that nobody can reach.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import BIN, ROOT, SHARED, Result, medians, output_of
from benchmarks.pruning import milliseconds, session
from kedge_protocol.bundle.layout import Layout

TARGET = "generic-cpu"
REPEATS = 5
ROUNDS, CALLS = 40, 50
ENVIRONMENT = ROOT / ".venv-olive"
SETS = {"ic_resnet8": ("ic", 50), "kws_dscnn": ("kws", 200)}
"""Model → its evaluation set, and how many of its samples calibrate."""


def run() -> Iterator[Result]:
    """Wall time, metric, bytes and milliseconds."""
    if not SHARED.exists():
        print("skipped: olive (the shared data is absent)")
        return
    python = _environment()
    if python is None:
        print("skipped: olive (it cannot be installed here)")
        return
    for name, (data, count) in SETS.items():
        with tempfile.TemporaryDirectory() as scratch:
            yield from _compared(name, data, count, python, Path(scratch))


def _environment() -> Path | None:
    """The Python of Olive's environment."""
    python, done = ENVIRONMENT / "bin" / "python", ENVIRONMENT / ".installed"
    locked = ROOT / "constraints" / "olive.txt"
    if done.exists() and done.stat().st_mtime >= locked.stat().st_mtime:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(locked)]
    if subprocess.run(pip, check=False).returncode:
        return None
    done.touch()
    return python


def _compared(name: str, data: str, count: int, python: Path, folder: Path) -> Iterator[Result]:
    model = SHARED / "models" / f"{name}.onnx"
    with np.load(SHARED / "eval" / f"{data}.npz") as arrays:
        given = {key: arrays[key] for key in ("input", "label")}
    np.savez(folder / "calib.npz", input=given["input"][:count])
    np.savez(folder / "eval.npz", **{key: value[count:] for key, value in given.items()})
    made: dict[str, Path] = {}

    def kedge() -> float:
        shutil.rmtree(folder / "OUT", ignore_errors=True)
        start = time.perf_counter()
        files = ["--calibration", folder / "calib.npz", "--evaluation", folder / "eval.npz"]
        names = ["--name", name, "--version", "1", "--target", TARGET]
        output_of([BIN / "kedge", "compile", model, *names, *files, "-o", folder / "OUT"])
        taken = time.perf_counter() - start
        made["kedge"] = _onnx_of(folder / "OUT")
        return taken

    def olive() -> float:
        shutil.rmtree(folder / "olive", ignore_errors=True)
        start = time.perf_counter()
        script = Path(__file__).parent / "bare" / "olive_static.py"
        arguments = [model, folder / "calib.npz", folder / "eval.npz", folder / "olive"]
        answer = output_of([python, script, *arguments], env={**os.environ, "CI": "1"})
        taken = time.perf_counter() - start
        made["olive"] = Path(json.loads(answer.splitlines()[-1])["model"])
        return taken

    ours, theirs = medians(REPEATS, kedge, olive)
    yield Result(
        f"{name} beside Olive: wall time",
        f"process start to end: static int8 with {count} samples, evaluated on {len(given['label']) - count}",
        "s",
        ours,
        theirs,
        "Olive's workflow, CI=1",
        "≤0.5×",
        ours <= 0.5 * theirs,
    )
    judged = {key: value[count:] for key, value in given.items()}
    values = {who: _top1(path, judged) for who, path in made.items()}
    yield Result(
        f"{name} beside Olive: wrong answers",
        "share of the evaluation set that the file gets wrong",
        "",
        1 - values["kedge"],
        1 - values["olive"],
        "Olive's file",
        "never more",
        values["kedge"] >= values["olive"],
    )
    sizes = {who: path.stat().st_size for who, path in made.items()}
    yield Result(
        f"{name} beside Olive: size",
        "of the ONNX file",
        "bytes",
        sizes["kedge"],
        sizes["olive"],
        "Olive's file",
        "never more",
        sizes["kedge"] <= sizes["olive"],
    )
    feed = {session(model).get_inputs()[0].name: judged["input"][:1].astype(np.float32)}
    fast, slow = medians(ROUNDS, *(milliseconds(made[who], feed, CALLS) for who in ("kedge", "olive")))
    yield Result(
        f"{name} beside Olive: latency",
        "one sample, ONNX Runtime, one thread",
        "ms",
        fast,
        slow,
        "Olive's file",
        "never more (5 % noise)",
        fast <= 1.05 * slow,
    )


def _onnx_of(release: Path) -> Path:
    """The file that the device executes, as it lies in the release."""
    layout = Layout(release)
    bundle = layout.bundle(TARGET)
    return layout.blob_path(bundle.files[bundle.config.entry].digest)


def _top1(path: Path, judged: dict[str, np.ndarray]) -> float:
    made = session(path)
    name = made.get_inputs()[0].name
    right = sum(
        int(made.run(None, {name: row[None].astype(np.float32)})[0].argmax() == label)
        for row, label in zip(judged["input"], judged["label"], strict=True)
    )
    return right / len(judged["label"])

"""Small inputs for the compiler, and its command line run as a user runs it."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge import Release
from kedge import compile as compile_model
from kedge_protocol.bundle.layout import Bundle, Layout
from tests.support import parallel
from tests.support.bundles import mlp, samples

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Inputs:
    """Files of one small compilation."""

    model: Path
    calibration: Path
    evaluation: Path
    out: Path

    def arguments(self, *, targets: Sequence[str] = ("generic-cpu",), **options: str) -> list[str]:
        """The command line of ``kedge compile``; ``options`` replace or add."""
        given = {
            "name": "tiny",
            "version": "1.0",
            "calibration": str(self.calibration),
            "evaluation": str(self.evaluation),
            "max-drop": "0.05",
            "out": str(self.out),
            **{key.replace("_", "-"): value for key, value in options.items()},
        }
        line = ["compile", str(self.model)]
        for target in targets:
            line += ["--target", target]
        for key, value in given.items():
            line += [f"--{key}", value]
        return line


def scores(model: Path, raw: Array) -> Array:
    """What ONNX Runtime answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, {session.get_inputs()[0].name: raw})[0]
    return answer


def small_inputs(folder: Path, *, seed: int = 0) -> Inputs:
    """The tiny MLP (input ``input`` [N, 16], output ``scores`` [N, 4]), 64 samples to calibrate, 96 to evaluate with
    the float model's own answers as labels."""
    model = folder / "model.onnx"
    model.write_bytes(mlp(seed=seed))
    calibration, evaluation = folder / "calibration.npz", folder / "evaluation.npz"
    raw = samples(160, seed=5)
    np.savez(calibration, input=raw[:64])
    np.savez(evaluation, input=raw[64:], label=scores(model, raw[64:]).argmax(axis=1))
    return Inputs(model, calibration, evaluation, folder / "OUT")


def without_progress(stderr: str) -> list[str]:
    """What a command said beside how far it was; lines of progress are indented."""
    return [line for line in stderr.splitlines() if line.strip() and not line.startswith(" ")]


def kedge(arguments: Sequence[str], *, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``kedge`` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kedge.cli.main", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        env={**os.environ, **(env or {})},
    )


SHARED_MODELS = {"ic": ("ic_resnet8.onnx", 50, 0.007), "kws": ("kws_dscnn.onnx", 200, 0.003)}
"""Short name → file, samples to calibrate on (the rest evaluates), allowed drop."""
SHARED_TARGETS = ("generic-cpu", "rpi4", "intel-cpu")


@functools.cache
def shared_release(
    shared_data: Path,
    short: str,
    run: int = 0,
    targets: tuple[str, ...] = SHARED_TARGETS,
    min_agreement: float | None = None,
    max_drop: float | None = None,
    max_size: str | None = None,
    quantize: str | None = None,
) -> Release:
    """A shared model compiled for all three targets (or those named), once for all tests and ``run``."""
    file, split, usual = SHARED_MODELS[short]

    def make(folder: Path) -> Release:
        with np.load(shared_data / "eval" / f"{short}.npz") as data:
            raw, label = data["input"], data["label"]
        np.savez(folder / "calibration.npz", input=raw[:split])
        np.savez(folder / "evaluation.npz", input=raw[split:], label=label[split:])
        return compile_model(
            shared_data / "models" / file,
            name=short,
            version="1.0",
            targets=targets,
            min_agreement=min_agreement,
            calibration=folder / "calibration.npz",
            evaluation=folder / "evaluation.npz",
            out=folder / "OUT",
            max_drop=usual if max_drop is None else max_drop,
            max_size=max_size,
            quantize=quantize,
        )

    wanted = repr((short, run, targets, min_agreement, max_drop, max_size, quantize))
    return parallel.once(f"release-{hashlib.sha256(wanted.encode()).hexdigest()[:16]}", make)


def unpacked(release: Release, target: str, folder: Path) -> Path:
    """The files of a target's bundle by title, as they lie in a device's slot; its configuration is ``config.json``."""
    return unpacked_bundle(release, release.bundles[target], folder)


def unpacked_bundle(release: Release, bundle: Bundle, folder: Path) -> Path:
    """The same of one bundle of a release."""
    layout = Layout(release.path)
    folder.mkdir(parents=True, exist_ok=True)
    for title, layer in bundle.files.items():
        shutil.copyfile(layout.blob_path(layer.digest), folder / title)
    (folder / "config.json").write_bytes(bundle.config_raw)
    return folder

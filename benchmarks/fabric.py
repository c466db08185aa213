"""The simulator of programmable logic against qonnx's executor on the same cleaned QONNX model, taking turns."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import ROOT, SHARED, Result
from kedge_protocol.errors import ToolchainError
from kedge_targets import registry, target
from kedge_targets.backends.finn import synthesis
from kedge_targets.contract import Lowered
from kedge_targets.numerics import Plan, Precision
from kedge_targets.toolchain import store

Array = npt.NDArray[Any]

BOARD = "pynq-z2"
ROUNDS, CALLS = 15, 4
TURNS = ((1, 1, 15.0), (256, 1, 150.0), (256, 256, 0.0))
"""Batch of the simulator, batch of qonnx, how many times as fast a sample has to be; 0 is shown without a goal."""
SCRIPT = ROOT / "benchmarks" / "bare" / "execute_qonnx.py"


def run() -> Iterator[Result]:
    """Per network: one sample alone, and a sample of a large batch."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name, lowered, samples in _networks(Path(scratch)):
                yield from _compared(name, lowered, samples, Path(scratch))
        except ToolchainError as error:
            print(f"skipped: fabric ({error})")


def _networks(folder: Path) -> Iterator[tuple[str, Lowered, Array]]:
    import torch
    from tests.support import lowering
    from tests.support.small_networks import digits_network

    torch.manual_seed(0)
    trained = digits_network(folder, None)
    yield "digits CNN, W4A4", trained.lowered(trained.graph, Precision.W4A4, folder / "digits"), trained.held_out
    if not SHARED.exists():
        print("skipped: FINN's published networks (the shared data is absent)")
        return
    with np.load(SHARED / "eval" / "mnist_t10k_uint8.npz") as arrays:
        images = arrays["input"][:1024].astype(np.float32) / 255
    for name in ("tfc_1w1a", "tfc_1w2a"):
        nothing = lowering.Calibration("global_in", images[:0])
        given = SHARED / "models" / f"{name}_qonnx.onnx"
        yield name, lowering.lower(BOARD, given, Plan(default=Precision.W2A2), nothing, folder / name), images


def _compared(name: str, lowered: Lowered, samples: Array, folder: Path) -> Iterator[Result]:
    backend = target.find(BOARD).backends[0].name
    session = registry.runtime(backend).load(lowered.files[lowered.entry], dict(lowered.runtime_options))
    python = store.find(backend).python
    file = lowered.files[synthesis.MODEL]
    for mine, theirs, goal in TURNS:
        with _Qonnx(python, file, samples[:100], folder, theirs) as qonnx:
            answers: Array = session.run([samples[:100]])[0].reshape(qonnx.answers.shape)
            np.testing.assert_allclose(answers, qonnx.answers, rtol=1e-4, atol=1e-4)
            session.run([samples[:mine]])
            taken: tuple[list[float], list[float]] = ([], [])
            for _ in range(ROUNDS):
                for _ in range(CALLS):
                    start = time.perf_counter()
                    session.run([samples[:mine]])
                    taken[0].append((time.perf_counter() - start) * 1000 / mine)
                taken[1].append(qonnx.milliseconds() / theirs)
        ours, other = (statistics.median(column) for column in taken)
        yield Result(
            f"simulator of programmable logic, {name}",
            f"a sample at batch {mine}, {ROUNDS} rounds in turns",
            "ms",
            ours,
            other,
            f"a sample of qonnx's execute_onnx at batch {theirs}, the same cleaned model",
            f"≥{goal:g}× as fast" if goal else "shown",
            other >= goal * ours,
        )


class _Qonnx:
    """qonnx's executor in the toolchain's environment, one execution when asked."""

    def __init__(self, python: Path, model: Path, samples: Array, folder: Path, batch: int) -> None:
        given, answers = folder / "samples.npy", folder / "answers.npy"
        np.save(given, samples)
        command = [str(python), "-P", str(SCRIPT), str(model), str(given), str(answers), str(batch)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if process.stdin is None or process.stdout is None:
            sys.exit("a pipe is missing")
        self._process, self._asked, self._answered = process, process.stdin, process.stdout
        while (line := self._said()) != "ready":
            print(line)
        self.answers: Array = np.load(answers)

    def milliseconds(self) -> float:
        """Of one execution."""
        self._asked.write("\n")
        self._asked.flush()
        return float(self._said())

    def _said(self) -> str:
        line = self._answered.readline()
        if not line:
            sys.exit("qonnx's executor ended before its time")
        return line.strip()

    def __enter__(self) -> _Qonnx:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

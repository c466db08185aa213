"""Kedge's int8 beside what one writes by hand with the runtime's own quantizer, from the same samples: ONNX Runtime's
``quantize_static`` (generic-cpu), NNCF (intel-cpu), ai-edge-quantizer (rpi4).

Four columns for each model: quality (the paired interval of the difference), bytes, milliseconds in turns, seconds of
one attempt. A peer that fails is shown with its own words.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import SHARED, Result
from kedge_protocol.errors import KedgeError

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]

_BARE = Path(__file__).parent / "bare"
_PEERS = {
    "generic-cpu": ("quantize_static", "ort_static.py", "peer.onnx"),
    "intel-cpu": ("NNCF", "nncf_static.py", "peer.xml"),
    "rpi4": ("ai-edge-quantizer", "edge_quantizer.py", "peer.tflite"),
}
_ROUNDS, _RESAMPLES = 60, 300
_POINTS, _SIZE, _LATENCY, _ATTEMPT = 0.002, 1.02, 1.05, 1.3


@dataclass(frozen=True)
class Case:
    """A model with its samples.

    Attributes:
        quality: outputs over ``evaluation`` → a function of chosen samples: their accuracy, mean average precision, F1.
    """

    model: Path
    calibration: Array
    evaluation: Array
    quality: Callable[[Array], Callable[[Array], float]]
    labels: Array | None = None


def run() -> Iterator[Result]:
    """Every model beside the peer of every target."""
    for name, made in _cases().items():
        case = made()
        for target, (peer, script, file) in _PEERS.items():
            with tempfile.TemporaryDirectory() as scratch:
                yield from _beside(name, case, target, peer, script, Path(scratch) / file)


def _cases() -> dict[str, Callable[[], Case]]:
    shared = {name: lambda name=name, data=data, n=n: _shared(name, data, n) for name, data, n in (
        ("ic_resnet8", "ic", 50), ("kws_dscnn", "kws", 200),
    )} if SHARED.exists() else {}  # fmt: skip
    return {**shared, "own detector": _detector, "nudenet": _nudenet}


def _shared(name: str, data: str, count: int) -> Case:
    with np.load(SHARED / "eval" / f"{data}.npz") as arrays:
        samples, labels = arrays["input"].astype(np.float32), arrays["label"]

    def quality(outputs: Array) -> Callable[[Array], float]:
        right = (outputs.reshape(len(outputs), -1).argmax(axis=1) == labels[count:]).astype(np.float64)
        return lambda chosen: float(right[chosen].mean())

    return Case(SHARED / "models" / f"{name}.onnx", samples[:count], samples[count:], quality, labels[count:])


def _detector() -> Case:
    from tests.support import own_detector

    pictures, truth = own_detector.judged(500)

    def quality(outputs: Array) -> Callable[[Array], float]:
        return own_detector.precisions(outputs, truth).mean

    return Case(own_detector.trained(), own_detector.calibration(96), pictures, quality)


def _nudenet() -> Case:
    from tests.support import detections, photos, zoo

    model = zoo.nudenet()
    pictures = photos.crops(200, 320, seed=2)
    want = zoo.found(model.answers({"images": pictures})[0])

    def quality(outputs: Array) -> Callable[[Array], float]:
        got = zoo.found(outputs)
        return lambda chosen: detections.f1([want[i] for i in chosen], [got[i] for i in chosen])

    return Case(model.path, photos.crops(64, 320, seed=0), pictures, quality)


def _beside(name: str, case: Case, target: str, peer: str, script: str, made: Path) -> Iterator[Result]:
    what = f"{name}, {target}"
    try:
        ours, files, seconds = _kedge(case, target, made.parent)
    except KedgeError as error:
        print(f"{what}: Kedge refuses: {error}", file=sys.stderr)
        return
    source = made.parent / "float.tflite" if made.suffix == ".tflite" else case.model
    theirs = _by_hand(case, script, source, made)
    if isinstance(theirs, str):
        yield Result(f"{what}: quality", "the peer fails", "", 0.0, None, peer, theirs, True)
        return
    run_peer = _opened(made)
    one, other = (case.quality(np.concatenate([way(row[None]) for row in case.evaluation])) for way in (ours, run_peer))
    everything = np.arange(len(case.evaluation))
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(everything), len(everything)) for _ in range(_RESAMPLES)]
    low, high = np.quantile([one(chosen) - other(chosen) for chosen in drawn], [0.025, 0.975])
    yield Result(
        f"{what}: quality", f"difference {low:+.4f} to {high:+.4f} (95 %)", "", one(everything), other(everything),
        peer, "a loss of more than 0.2 points is excluded", bool(low >= -_POINTS),
    )  # fmt: skip
    size = sum(file.stat().st_size for file in (made, made.with_suffix(".bin")) if file.is_file())
    mine = sum(file.stat().st_size for file in files)
    yield Result(f"{what}: size", "of the files", "bytes", mine, size, peer, f"≤{_SIZE}×", mine <= _SIZE * size)
    fast, slow = _in_turns(case.evaluation, ours, run_peer)
    yield Result(
        f"{what}: latency", "one sample, CPU time in turns, one thread", "ms", fast, slow, peer, f"≤{_LATENCY}×",
        fast <= _LATENCY * slow,
    )  # fmt: skip
    yield Result(
        f"{what}: one attempt", "quantization from float, calibration included", "s", seconds, theirs, peer,
        f"≤{_ATTEMPT}×", seconds <= _ATTEMPT * theirs,
    )  # fmt: skip


def _kedge(case: Case, target: str, folder: Path) -> tuple[Run, list[Path], float]:
    """The bundle as a function, its files, seconds of one attempt (the first, plain int8)."""
    import kedge
    from kedge_protocol.bundle.layout import Layout

    _saved(folder / "calibration.npz", case, case.calibration)
    _saved(folder / "evaluation.npz", case, case.evaluation[:200], None if case.labels is None else case.labels[:200])
    given = {"calibration": folder / "calibration.npz", "evaluation": folder / "evaluation.npz", "targets": [target]}
    kedge.compile(case.model, name="peer", version="1", out=folder / "OUT", **given)
    if target == "rpi4":
        plain = {"quantize": "precision=float32", "max_drop": 1.0, "out": folder / "float"}
        kedge.compile(case.model, name="peer", version="1", **given, **plain)
        _entry(Layout(folder / "float"), target)[0].rename(folder / "float.tflite")
    report = json.loads((folder / "OUT" / "report.json").read_text())["bundles"][0]
    first = next(one for one in report["attempts"] if one["seconds"])
    model = _model(folder / "OUT", target)
    return model, _entry(Layout(folder / "OUT"), target), first["seconds"]["lower"]


def _model(out: Path, target: str) -> Run:
    import kedge_agent

    model = kedge_agent.Model(out, target=target)

    def call(sample: Array) -> Array:
        got = model(sample)
        return np.asarray(got[0] if isinstance(got, tuple | list) else got)

    return call


def _entry(layout: Any, target: str) -> list[Path]:
    bundle = layout.bundle(target)
    return [layout.blob_path(file.digest) for title, file in bundle.files.items() if title.startswith("model")]


def _saved(path: Path, case: Case, samples: Array, labels: Array | None = None) -> None:
    import onnx

    name = onnx.load(str(case.model)).graph.input[0].name
    np.savez(path, **{name: samples}, **({} if labels is None else {"label": labels}))


def _by_hand(case: Case, script: str, source: Path, out: Path) -> float | str:
    """Seconds of one attempt of the peer; or its last words."""
    from tests.support import foreign

    unpacked = [str(foreign.package(name)) for name in ("ai-edge-quantizer", "immutabledict")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(unpacked)}
    np.savez(out.parent / "samples.npz", samples=case.calibration)
    command = [sys.executable, _BARE / script, source, out.parent / "samples.npz", out]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, timeout=900
    )
    if done.returncode:
        return f"fails: {(done.stderr.strip().splitlines() or ['no word'])[-1][:160]}"
    return float(done.stdout.split()[-1])


def _opened(file: Path) -> Run:
    """The peer's file in its runtime, one thread."""
    if file.suffix == ".onnx":
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda sample: np.asarray(session.run(None, {name: sample})[0])
    if file.suffix == ".xml":
        import openvino

        how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
        request = openvino.Core().compile_model(str(file), "CPU", how).create_infer_request()
        return lambda sample: np.asarray(request.infer({0: sample})[0]).copy()
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=1)
    runner = interpreter.get_signature_runner()
    (given,) = runner.get_input_details()

    def call(sample: Array) -> Array:
        return np.asarray(next(iter(runner(**{given: sample}).values())))

    return call


def _in_turns(samples: Array, *ways: Run) -> list[float]:
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(_ROUNDS):
        sample = samples[number % len(samples)][None]
        for way, times in zip(ways, taken, strict=True):
            start = time.process_time()
            way(sample)
            times.append(time.process_time() - start)
    return [1e3 * float(np.median(times[5:])) for times in taken]

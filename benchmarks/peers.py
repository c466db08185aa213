"""Kedge's int8 beside what one writes by hand with the runtime's own quantizer, from the same samples: ONNX Runtime's
``quantize_static`` (generic-cpu), NNCF (intel-cpu), ai-edge-quantizer (rpi4).

Four columns for each model: quality (the paired interval of the difference), bytes, milliseconds in turns, processor
seconds of one attempt, which a busy machine changes less than the clock's. A peer that fails is shown with its own
words.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import SHARED, Result, bare_environment, ended_seconds, living_seconds, output_of
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
        raw: what ``Model.raw`` takes, as multiples of the model's own inputs.
    """

    model: Path
    calibration: Array
    evaluation: Array
    quality: Callable[[Array], Callable[[Array], float]]
    labels: Array | None = None
    raw: float = 1.0


def run() -> Iterator[Result]:
    """Every model beside the peer of every target; of the models that ``KEDGE_PEERS`` names, where it is set."""
    chosen = os.environ.get("KEDGE_PEERS", "")
    for name, made in _cases().items():
        if chosen and name not in chosen.split(","):
            continue
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

    return Case(model.path, photos.crops(64, 320, seed=0), pictures, quality, raw=model.raw)


@dataclass(frozen=True)
class Ours:
    """Kedge's bundle.

    Attributes:
        run: as a program calls it.
        bare: its file in the runtime alone, as the peer's is run.
        size: bytes of its files.
        seconds: processor time of one attempt (plain int8, from the ONNX file).
        source: what the peer starts from: the model, or for TFLite Kedge's own float file of it.
        given, made: how a file of TFLite has the axes of input and output; None as the model has them.
    """

    run: Run
    bare: Run
    size: int
    seconds: float
    source: Path
    given: tuple[int, ...] | None = None
    made: tuple[int, ...] | None = None


def _beside(name: str, case: Case, target: str, peer: str, script: str, made: Path) -> Iterator[Result]:
    what = f"{name}, {target}"
    try:
        ours = _kedge(case, target, made.parent)
    except KedgeError as error:
        print(f"{what}: Kedge refuses: {error}", file=sys.stderr)
        return
    theirs = _by_hand(case, script, ours, made)
    if isinstance(theirs, str):
        yield Result(f"{what}: quality", "the peer fails", "", 0.0, None, peer, theirs, True)
        return
    run_peer = _opened(made, ours)
    ways = (ours.run, run_peer)
    one, other = (case.quality(np.concatenate([way(row[None]) for row in case.evaluation])) for way in ways)
    everything = np.arange(len(case.evaluation))
    rng = np.random.default_rng(0)
    drawn = [rng.integers(0, len(everything), len(everything)) for _ in range(_RESAMPLES)]
    low, high = np.quantile([one(chosen) - other(chosen) for chosen in drawn], [0.025, 0.975])
    yield Result(
        f"{what}: quality", f"difference {low:+.4f} to {high:+.4f} (95 %)", "", one(everything), other(everything),
        peer, "a loss of more than 0.2 points is excluded", bool(low >= -_POINTS),
    )  # fmt: skip
    size = sum(file.stat().st_size for file in (made, made.with_suffix(".bin")) if file.is_file())
    yield Result(
        f"{what}: size", "of the files", "bytes", ours.size, size, peer, f"≤{_SIZE}×", ours.size <= _SIZE * size
    )
    fast, slow = _in_turns(case.evaluation, ours.bare, run_peer)
    yield Result(
        f"{what}: latency", "one sample, both files in the bare runtime, CPU time in turns, one thread", "ms", fast,
        slow, peer, f"≤{_LATENCY}×", fast <= _LATENCY * slow,
    )  # fmt: skip
    yield Result(
        f"{what}: one attempt", "from the ONNX file to int8, calibration included", "CPU s", ours.seconds, theirs, peer,
        f"≤{_ATTEMPT}×", ours.seconds <= _ATTEMPT * theirs,
    )  # fmt: skip


def _kedge(case: Case, target: str, folder: Path) -> Ours:
    import kedge
    import kedge_agent

    _saved(folder / "calibration.npz", case, case.calibration)
    _saved(folder / "evaluation.npz", case, case.evaluation[:200], None if case.labels is None else case.labels[:200])
    given: dict[str, Any] = {
        "calibration": folder / "calibration.npz",
        "evaluation": folder / "evaluation.npz",
        "targets": [target],
    }
    kedge.compile(case.model, name="peer", version="1", out=folder / "OUT", **given)
    file, size, _ = _unpacked(folder / "OUT", target, folder / "ours")
    model = kedge_agent.Model(folder / "OUT", target=target)

    def call(sample: Array) -> Array:
        got = model.raw(sample if case.raw == 1 else sample * np.float32(case.raw))
        return np.asarray(got[0] if isinstance(got, tuple | list) else got)

    made = Ours(call, call, size, _attempt(case, target, folder), case.model)
    if target == "rpi4":
        plain: dict[str, Any] = {"quantize": "precision=float32", "max_drop": 1.0, "out": folder / "float"}
        kedge.compile(case.model, name="peer", version="1", **given, **plain)
        source, _, config = _unpacked(folder / "float", target, folder / "plain")
        axes = (config.inputs[0].file.permutation, config.outputs[0].file.permutation)
        made = replace(made, source=source, given=axes[0], made=axes[1])
    return replace(made, bare=_opened(file, made))


def _attempt(case: Case, target: str, folder: Path) -> float:
    """Processor seconds of one int8 file, by this process and the toolchain's; imports are made before."""
    import onnx
    from tests.support import lowering

    from kedge_targets import registry
    from kedge_targets.numerics import Precision
    from kedge_targets.target import find

    for module in getattr(registry.compiler(find(target).backends[0].name), "modules", ()):
        importlib.import_module(module)
    graph = lowering.checked_copy(case.model, folder)
    samples = lowering.Calibration(onnx.load(str(case.model)).graph.input[0].name, case.calibration)
    before = living_seconds()
    lowering.lower(target, graph, Precision.INT8, samples, folder / "attempt")
    return living_seconds() - before


def _converted(folder: Path) -> float:
    """Processor seconds in which onnx2tf and TensorFlow make the float file that the peer of TFLite starts from, of the
    graph that Kedge prepared for them."""
    from kedge_targets import toolchain

    before = ended_seconds()
    script = [_BARE / "tflite_float.py", folder / "attempt" / "folded.onnx", folder / "bare.tflite"]
    output_of([toolchain.find("tflite").python, *script], env=bare_environment())
    return ended_seconds() - before


def _unpacked(out: Path, target: str, folder: Path) -> tuple[Path, int, Any]:
    """The file that the runtime opens, among the others under their own names; their bytes; the bundle's config."""
    from kedge_protocol.bundle.layout import Layout

    layout = Layout(out)
    bundle = layout.bundle(target)
    folder.mkdir()
    names = [title for title in bundle.files if title.startswith("model")]
    for title in names:
        shutil.copyfile(layout.blob_path(bundle.files[title].digest), folder / title)
    return folder / bundle.config.entry, sum((folder / title).stat().st_size for title in names), bundle.config


def _saved(path: Path, case: Case, samples: Array, labels: Array | None = None) -> None:
    import onnx

    name = onnx.load(str(case.model)).graph.input[0].name
    arrays: dict[str, Any] = {name: samples} if labels is None else {name: samples, "label": labels}
    np.savez(path, **arrays)


def _by_hand(case: Case, script: str, ours: Ours, out: Path) -> float | str:
    """Seconds of one attempt of the peer; or its last words."""
    from tests.support import foreign

    unpacked = [str(foreign.package(name)) for name in ("ai-edge-quantizer", "immutabledict")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(unpacked)}
    samples = case.calibration if ours.given is None else case.calibration.transpose(ours.given)
    np.savez(out.parent / "samples.npz", samples=samples)
    command = [sys.executable, _BARE / script, ours.source, out.parent / "samples.npz", out]
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env=environment, timeout=900
    )
    if done.returncode:
        return f"fails: {(done.stderr.strip().splitlines() or ['no word'])[-1][:160]}"
    return float(done.stdout.split()[-1]) + (_converted(out.parent) if out.suffix == ".tflite" else 0.0)


def _opened(file: Path, ours: Ours) -> Run:
    """A file in its runtime, one thread."""
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
    return _of_tflite(file, ours)


def _of_tflite(file: Path, ours: Ours) -> Run:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=1)
    interpreter.allocate_tensors()
    (given,), made = interpreter.get_input_details(), interpreter.get_output_details()[0]
    back = None if ours.made is None else np.argsort(ours.made)

    def call(sample: Array) -> Array:
        if ours.given is not None:
            sample = sample.transpose(ours.given)
        scale, zero = given["quantization"]
        if given["dtype"] is np.int8:
            sample = np.clip(np.rint(sample / scale) + zero, -128, 127)
        interpreter.set_tensor(given["index"], np.ascontiguousarray(sample, given["dtype"]))
        interpreter.invoke()
        answer = interpreter.get_tensor(made["index"])
        scale, zero = made["quantization"]
        if made["dtype"] is np.int8:
            answer = (answer.astype(np.float32) - zero) * scale
        return np.asarray(answer if back is None else answer.transpose(back))

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

"""Kedge's int8 beside what one writes by hand with the runtime's own quantizer, from the same samples: ONNX Runtime's
``quantize_static`` (generic-cpu), NNCF (intel-cpu), ai-edge-quantizer (rpi4). Each twice: as its guide has it, and told
to leave the same layers in float as Kedge's bundle does, which is equal precision.

Four columns for each: quality (the paired interval of the difference), bytes, milliseconds in turns, processor seconds
of one attempt, which a busy machine changes less than the clock's. A peer that fails is shown with its own words.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import float_layers
from benchmarks.harness import Result, bare_environment, ended_seconds, living_seconds, output_of
from benchmarks.peer_cases import Case, cases
from kedge_protocol.errors import KedgeError

Array = npt.NDArray[Any]
Run = Callable[[Array], Array]

_BARE = Path(__file__).parent / "bare"
_PEERS = {
    "generic-cpu": ("quantize_static", "ort_static.py", "peer.onnx"),
    "intel-cpu": ("NNCF", "nncf_static.py", "peer.xml"),
    "rpi4": ("ai-edge-quantizer", "edge_quantizer.py", "peer.tflite"),
}
_SEARCHED = 200
"""Samples that the search judges by."""
_FEWEST_ROUNDS, _MOST_ROUNDS, _SECONDS = 60, 1500, 6.0
"""Of calls in turns: as many as take so many processor seconds."""
_RESAMPLES = 300
_POINTS, _SIZE, _LATENCY, _ATTEMPT = 0.002, 1.02, 1.05, 1.3


def run() -> Iterator[Result]:
    """Every model beside the peer of every target; of the models and targets that ``KEDGE_PEERS`` and
    ``KEDGE_PEERS_TARGETS`` name, where these are set."""
    models, targets = (
        [name for name in os.environ.get(variable, "").split(",") if name]
        for variable in ("KEDGE_PEERS", "KEDGE_PEERS_TARGETS")
    )
    for name, made in cases().items():
        if models and name not in models:
            continue
        case = made()
        for target in _PEERS:
            if not targets or target in targets:
                with tempfile.TemporaryDirectory() as scratch:
                    yield from _beside(name, case, target, Path(scratch))


@dataclass(frozen=True)
class Ours:
    """Kedge's bundle.

    Attributes:
        run: as a program calls it.
        bare: its file in the runtime alone, as the peer's is run.
        size: bytes of its files.
        seconds: processor time of one attempt (plain int8, from the ONNX file).
        floating: what computes in float, as the peer has to be told.
        source: what the peer starts from: the model, or for TFLite Kedge's own float file of it.
        given, made: how a file of TFLite has the axes of input and output; None as the model has them.
    """

    run: Run
    bare: Run
    size: int
    seconds: float
    source: Path
    floating: tuple[str, ...] = ()
    given: tuple[int, ...] | None = None
    made: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Theirs:
    """A peer's file.

    Attributes:
        name: of the peer, and what it was told.
        size: bytes of its files.
        seconds: processor time of one attempt.
    """

    name: str
    run: Run
    size: int
    seconds: float


def _beside(name: str, case: Case, target: str, folder: Path) -> Iterator[Result]:
    what = f"{name}, {target}"
    peer, script, file = _PEERS[target]
    try:
        ours = _kedge(case, target, folder)
    except KedgeError as error:
        print(f"{what}: Kedge refuses: {error}", file=sys.stderr)
        return
    told: dict[str, tuple[str, ...]] = {peer: ()}
    if ours.floating:
        told[f"{peer}, {len(ours.floating)} operators in float as Kedge's"] = ours.floating
    peers = []
    for number, (title, floating) in enumerate(told.items()):
        made = folder / f"{number}-{file}"
        seconds = _by_hand(case, script, ours, floating, made)
        if isinstance(seconds, str):
            yield Result(f"{what}: quality", "the peer fails", "", 0.0, None, title, seconds, True)
            continue
        size = sum(one.stat().st_size for one in (made, made.with_suffix(".bin")) if one.is_file())
        peers.append(Theirs(title, _opened(made, ours), size, seconds))
    yield from _qualities(what, case, ours, peers)
    yield from _times(what, case, ours, peers)


def _qualities(what: str, case: Case, ours: Ours, peers: Sequence[Theirs]) -> Iterator[Result]:
    one, *others = (
        case.quality(np.concatenate([way(row[None]) for row in case.judged]))
        for way in (ours.run, *(peer.run for peer in peers))
    )
    everything = np.arange(len(case.judged))
    for peer, other in zip(peers, others, strict=True):
        found = _intervals(case, one, other)
        spans = [f"{low:+.4f} to {high:+.4f}" for low, high in found]
        yield Result(
            f"{what}: quality", f"difference {', with the same originals '.join(spans)} (95 %)", "", one(everything),
            other(everything), peer.name, "a loss of more than 0.2 points is excluded", found[0][0] >= -_POINTS,
        )  # fmt: skip
        yield Result(
            f"{what}: size", "of the files", "bytes", ours.size, peer.size, peer.name, f"≤{_SIZE}×",
            ours.size <= _SIZE * peer.size,
        )  # fmt: skip


def _intervals(case: Case, one: Callable[[Array], float], other: Callable[[Array], float]) -> list[tuple[float, float]]:
    """95 % of the differences of two qualities: with the original samples drawn anew, each with all that was made of
    it; and with the originals as they are and what was made of each drawn anew, where there is more than one of each.
    """
    rng = np.random.default_rng(0)
    made_of = [np.flatnonzero(case.origins == origin) for origin in np.unique(case.origins)]
    count, found = len(made_of), []
    fresh = (np.concatenate([made_of[origin] for origin in rng.integers(0, count, count)]) for _ in range(_RESAMPLES))
    same = (np.concatenate([rng.choice(made, len(made)) for made in made_of]) for _ in range(_RESAMPLES))
    for draws in (fresh, same) if len(case.origins) > count else (fresh,):
        low, high = np.quantile([one(chosen) - other(chosen) for chosen in draws], [0.025, 0.975])
        found.append((float(low), float(high)))
    return found


def _times(what: str, case: Case, ours: Ours, peers: Sequence[Theirs]) -> Iterator[Result]:
    mine, *others = _in_turns(case.evaluation, ours.bare, *(peer.run for peer in peers))
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(mine), (_RESAMPLES, len(mine)))
    for peer, other in zip(peers, others, strict=True):
        low, high = np.quantile(np.median(mine[draws], axis=1) / np.median(other[draws], axis=1), [0.025, 0.975])
        fast, slow = float(np.median(mine)), float(np.median(other))
        yield Result(
            f"{what}: latency",
            f"one sample, both in the bare runtime, CPU time in turns, one thread; {low:.3f} to {high:.3f} (95 %)",
            "ms", fast, slow, peer.name, f"≤{_LATENCY}×", fast <= _LATENCY * slow,
        )  # fmt: skip
        yield Result(
            f"{what}: one attempt", "from the ONNX file to int8, calibration included", "CPU s", ours.seconds,
            peer.seconds, peer.name, f"≤{_ATTEMPT}×", ours.seconds <= _ATTEMPT * peer.seconds,
        )  # fmt: skip


def _kedge(case: Case, target: str, folder: Path) -> Ours:
    import kedge
    import kedge_agent

    _saved(folder / "calibration.npz", case, case.calibration)
    _saved(
        folder / "evaluation.npz",
        case,
        case.evaluation[:_SEARCHED],
        None if case.labels is None else case.labels[:_SEARCHED],
    )
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

    (bundle,) = json.loads((folder / "OUT" / "report.json").read_text())["bundles"]
    named = tuple(layer["name"] for layer in bundle["layers"] if layer["precision"] == "float32")
    made = Ours(call, call, size, _attempt(case, target, folder / "attempt"), case.model)
    if target == "rpi4":
        plain: dict[str, Any] = {"quantize": "precision=float32", "max_drop": 1.0, "out": folder / "float"}
        kedge.compile(case.model, name="peer", version="1", **given, **plain)
        source, _, config = _unpacked(folder / "float", target, folder / "plain")
        axes = (config.inputs[0].file.permutation, config.outputs[0].file.permutation)
        made = replace(made, source=source, given=axes[0], made=axes[1])
    floating = float_layers.of_bundle(file, made.source, named)
    return replace(made, bare=_opened(file, made), floating=tuple(floating))


def _attempt(case: Case, target: str, folder: Path) -> float:
    """Processor seconds of one int8 file, by this process and the toolchain's; imports are made before."""
    import onnx
    from tests.support import lowering

    from kedge_targets import registry
    from kedge_targets.numerics import Precision
    from kedge_targets.target import find

    for module in getattr(registry.compiler(find(target).backends[0].name), "modules", ()):
        importlib.import_module(module)
    folder.mkdir()
    graph = lowering.checked_copy(case.model, folder)
    samples = lowering.Calibration(onnx.load(str(case.model)).graph.input[0].name, case.calibration)
    before = living_seconds()
    lowering.lower(target, graph, Precision.INT8, samples, folder)
    return living_seconds() - before


def _converted(attempt: Path) -> float:
    """Processor seconds in which onnx2tf and TensorFlow make the float file that the peer of TFLite starts from, of the
    graph that Kedge prepared for them."""
    from kedge_targets import toolchain

    before = ended_seconds()
    script = [_BARE / "tflite_float.py", attempt / "folded.onnx", attempt / "bare.tflite"]
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


def _by_hand(case: Case, script: str, ours: Ours, floating: Sequence[str], out: Path) -> float | str:
    """Seconds of one attempt of the peer; or its last words."""
    from tests.support import foreign

    unpacked = [str(foreign.package(name)) for name in ("ai-edge-quantizer", "immutabledict")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(unpacked)}
    samples = case.calibration if ours.given is None else case.calibration.transpose(ours.given)
    np.savez(out.parent / "samples.npz", samples=samples)
    (out.parent / "float.json").write_text(json.dumps(floating))
    command = [sys.executable, _BARE / script, ours.source, out.parent / "samples.npz", out, out.parent / "float.json"]
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=out.parent,
        timeout=900,
    )
    if done.returncode:
        return f"fails: {(done.stderr.strip().splitlines() or ['no word'])[-1][:160]}"
    return float(done.stdout.split()[-1]) + (_converted(out.parent / "attempt") if out.suffix == ".tflite" else 0.0)


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


def _in_turns(samples: Array, *ways: Run) -> list[Array]:
    """Milliseconds of each way's calls, of which the first are left out."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(_MOST_ROUNDS):
        sample = samples[number % len(samples)][None]
        for way, times in zip(ways, taken, strict=True):
            start = time.process_time()
            way(sample)
            times.append(1e3 * (time.process_time() - start))
        if number >= _FEWEST_ROUNDS and sum(map(sum, taken)) > 1e3 * _SECONDS:
            break
    return [np.asarray(times[5:]) for times in taken]

"""A ``Model(...)`` call against the bare runtime's own call, conversions included in both; import time."""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import BIN, SHARED, Result, medians

CALLS = 3000


def run() -> Iterator[Result]:
    """Per runtime of an int8 ic_resnet8, and the import of ``kedge_agent``."""
    yield from nearly_empty()
    yield from _calls()
    yield from imports()


def imports() -> Iterator[Result]:
    """What an import takes, over numpy's."""
    for what, statement in (
        ("`kedge_agent`", "import kedge_agent"),
        ("`kedge_agent.Model`", "from kedge_agent import Model"),
    ):
        kedge, numpy_alone = medians(7, lambda statement=statement: _import_seconds(statement), _import_numpy)
        yield Result(
            f"import of {what}",
            "`-X importtime`, everything that it loads",
            "s",
            kedge,
            numpy_alone,
            "numpy alone",
            "≤1.3×",
            kedge <= 1.3 * numpy_alone,
        )


def nearly_empty() -> Iterator[Result]:
    """A call of an installed model whose graph is next to nothing, in each form, in turns with the bare session."""
    import onnxruntime
    from tests.support.bundles import make_bundle, mlp, samples
    from tests.support.installed import install

    from kedge_agent import Model

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    bare = onnxruntime.InferenceSession(mlp(), options, providers=["CPUExecutionProvider"])
    sample = samples(1)
    with tempfile.TemporaryDirectory() as scratch:
        install(Path(scratch) / "state", make_bundle(Path(scratch)))
        with Model("tiny", state=Path(scratch) / "state") as model:
            forms: dict[str, Callable[[], Any]] = {
                "an array": lambda: model(sample),
                "a keyword": lambda: model(input=sample),
                "`{name: array}`": lambda: model({"input": sample}),
            }
            for what, call in forms.items():
                ours, theirs = _alternating(call, lambda: bare.run(None, {"input": sample}))
                yield Result(
                    f"`Model(...)` call with {what}",
                    f"one sample of 16 numbers through two small layers, median of {CALLS} calls",
                    "µs",
                    ours,
                    theirs,
                    "ONNX Runtime's session",
                    "+4 µs",
                    ours <= theirs + 4,
                )


def _import_seconds(statement: str) -> float:
    command = [str(BIN / "python"), "-X", "importtime", "-c", statement]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    own = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    # The interpreter's own start comes first; `site` is its last.
    names = [parts[2].strip() for parts in own]
    return sum(int(parts[0]) for parts in own[names.index("site") + 1 :]) / 1e6


def _import_numpy() -> float:
    return _import_seconds("import numpy")


def _calls() -> Iterator[Result]:
    model = SHARED / "models" / "ic_resnet8.onnx"
    if not model.exists():
        print("skipped: calls (the shared data is absent)")
        return
    import kedge
    from kedge_agent import Model

    data = np.load(SHARED / "eval" / "ic.npz")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        np.savez(folder / "calib.npz", input=data["input"][:50])
        np.savez(folder / "eval.npz", input=data["input"][50:], label=data["label"][50:])
        release = kedge.compile(
            model,
            name="ic",
            version="1",
            targets=["generic-cpu", "rpi4"],
            calibration=folder / "calib.npz",
            evaluation=folder / "eval.npz",
            out=folder / "OUT",
            max_drop=0.05,
        )
        image = np.ascontiguousarray(data["input"][60:61])
        from kedge_protocol.bundle.layout import Layout

        layout = Layout(release.path)
        for target in ("generic-cpu", "rpi4"):
            bundle = layout.bundle(target)
            file = layout.blob_path(bundle.files[bundle.config.entry].digest)
            called = Model(release.path, target=target)
            bare = _BARE[bundle.config.entry.rpartition(".")[2]](file, bundle.config, image)
            np.testing.assert_allclose(called(image), bare(), atol=1e-6)
            ours, theirs = _alternating(lambda called=called: called(image), bare)
            yield Result(
                f"`Model(...)` call, {bundle.config.backend}",
                f"one sample of ic_resnet8 {bundle.config.precision}, conversion included, median of {CALLS} calls",
                "µs",
                ours,
                theirs,
                "the bare runtime with the same conversion in numpy",
                "≤1.1× or +5 µs",
                ours <= max(1.1 * theirs, theirs + 5),
            )
        yield _looked_at(release.path, image, folder / "state")


def _looked_at(release: Path, image: Any, state: Path) -> Result:
    """An installed model whose calls are looked at for drift, against one whose calls never are."""
    from kedge_agent import Model, observing
    from kedge_agent.slots import ModelFolder
    from kedge_protocol.bundle.layout import Layout

    layout = Layout(release)
    bundle = layout.bundle("generic-cpu")
    folder = ModelFolder(state, "ic")
    folder.switch(folder.assemble(bundle, layout.blob_path))
    with Model("ic", state=state) as watched, Model("ic", state=state) as plain:
        plain.loaded()._due[0] = observing.NEVER
        ours, theirs = _alternating(lambda: watched(image), lambda: plain(image))
    return Result(
        "call of an installed model, looked at for drift",
        f"one sample of ic_resnet8 {bundle.config.precision}, median of {CALLS} calls",
        "µs",
        ours,
        theirs,
        "the same, never looked at",
        "+1 µs",
        ours <= theirs + 1,
    )


def _alternating(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
    """Medians in µs of single calls, taken in turns of 50."""
    taken: tuple[list[int], list[int]] = ([], [])
    for _ in range(CALLS // 50):
        for column, call in zip(taken, (first, second), strict=True):
            for _ in range(50):
                start = time.perf_counter_ns()
                call()
                column.append(time.perf_counter_ns() - start)
    return statistics.median(taken[0]) / 1000, statistics.median(taken[1]) / 1000


def _bare_onnx(file: Path, config: Any, image: Any) -> Callable[[], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: image})[0]


def _bare_lite(file: Path, config: Any, image: Any) -> Callable[[], Any]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(file), num_threads=config.runtime_options.get("threads", 1))
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    in_scale, in_zero = given["quantization"]
    out_scale, out_zero = made["quantization"]

    def call() -> Any:
        quantized = np.clip(np.rint(image / np.float32(in_scale)) + in_zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(given["index"], quantized)
        interpreter.invoke()
        return (interpreter.get_tensor(made["index"]).astype(np.float32) - out_zero) * np.float32(out_scale)

    return call


_BARE = {"onnx": _bare_onnx, "tflite": _bare_lite}

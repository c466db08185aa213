"""How quickly ``.tflite`` files are made: the first int8 candidate of a model beside one bare process that makes its
float file, and what each further candidate takes. Processor seconds of this process and its children, which a busy
machine changes less than the clock's."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.harness import SHARED, Result, bare_environment, ended_seconds, living_seconds, output_of

_FIRST, _FURTHER = 1.5, 1.0


def run() -> Iterator[Result]:
    """ic_resnet8 for rpi4: first candidate, then single layers in float, with 16 bits, and other precisions."""
    from tests.support import lowering

    from kedge_targets import toolchain
    from kedge_targets.numerics import Plan, Precision

    if not SHARED.exists():
        print("skipped: tflite (the shared data is absent)")
        return
    case = lowering.ic(SHARED)
    layer = "Conv_12"
    plans = {
        "int8": Plan(default=Precision.INT8),
        "int8, a layer in float": Plan(default=Precision.INT8, layers={layer: Precision.FLOAT32}),
        "int8, a layer with 16 bits": Plan(default=Precision.INT8, layers={layer: Precision.INT16}),
        "float16": Plan(default=Precision.FLOAT16),
        "int8-dynamic": Plan(default=Precision.INT8_DYNAMIC),
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph = lowering.checked_copy(case.model, folder)
        taken = {}
        for number, (name, plan) in enumerate(plans.items()):
            before = living_seconds()
            lowering.lower("rpi4", graph, plan, lowering.Calibration("input", case.calibration), folder / str(number))
            taken[name] = living_seconds() - before
        script = Path(__file__).parent / "bare" / "tflite_float.py"
        bare = ended_seconds()
        python = toolchain.find("tflite").python
        output_of([python, script, folder / "0" / "folded.onnx", folder / "bare.tflite"], env=bare_environment())
        bare = ended_seconds() - bare
    first = taken.pop("int8")
    yield Result(
        "first `.tflite`",
        "int8 of ic_resnet8 with calibration, checks and the toolchain's start",
        "CPU s",
        first,
        bare,
        "one bare process: onnx2tf and TFLiteConverter, the float file",
        f"≤{_FIRST}×",
        first <= _FIRST * bare,
    )
    for name, seconds in taken.items():
        yield Result("each further one", name, "CPU s", seconds, None, "", f"≤{_FURTHER:g} s", seconds <= _FURTHER)

"""``kedge compile`` for ONNX Runtime against a bare process that does the same by hand."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.harness import BIN, SHARED, Result, medians, output_of

REPEATS = 5


def run() -> Iterator[Result]:
    """Two ratios on ic_resnet8: the quantizer's own call, and the whole command."""
    model = SHARED / "models" / "ic_resnet8.onnx"
    if not model.exists():
        print("skipped: compile (the shared data is absent)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        samples = np.load(SHARED / "eval" / "ic.npz")
        np.savez(folder / "calib.npz", input=samples["input"][:50])
        np.savez(folder / "eval.npz", input=samples["input"][50:], label=samples["label"][50:])
        settings = _settings()
        spans: dict[str, list[float]] = {"kedge": [], "bare": []}

        def kedge() -> float:
            shutil.rmtree(folder / "OUT", ignore_errors=True)
            start = time.perf_counter()
            data = ["--calibration", folder / "calib.npz", "--evaluation", folder / "eval.npz"]
            names = ["--name", "ic", "--version", "1", "--target", "generic-cpu"]
            output_of([BIN / "kedge", "compile", model, *names, *data, "-o", folder / "OUT"])
            taken = time.perf_counter() - start
            report = json.loads((folder / "OUT" / "report.json").read_text())
            spans["kedge"].append(report["bundles"][0]["attempts"][-1]["seconds"]["quantize"])
            return taken

        def bare() -> float:
            start = time.perf_counter()
            script = Path(__file__).parent / "bare" / "quantize.py"
            arguments = [model, folder / "calib.npz", folder / "eval.npz", folder / "bare.onnx", json.dumps(settings)]
            answer = output_of([BIN / "python", script, *arguments], env=dict(os.environ))
            spans["bare"].append(json.loads(answer.splitlines()[-1])["quantize"])
            return time.perf_counter() - start

        whole, by_hand = medians(REPEATS, kedge, bare)
        inner = {name: float(np.median(values)) for name, values in spans.items()}
    yield Result(
        "int8 quantization",
        "`quantize_static` with calibration on 50 samples of ic_resnet8, inside `kedge compile`",
        "s",
        inner["kedge"],
        inner["bare"],
        "the same call in a bare process",
        "≤1.2×",
        inner["kedge"] <= 1.2 * inner["bare"],
    )
    yield Result(
        "whole `kedge compile`",
        "process start to end: ic_resnet8 for generic-cpu, 50 and 150 samples",
        "s",
        whole,
        by_hand,
        "a bare process that quantizes and evaluates both models",
        "≤2×",
        whole <= 2 * by_hand,
    )


def _settings() -> dict[str, object]:
    """The settings that the backend takes for generic-cpu, so that both do the same work."""
    from kedge_targets import registry, target
    from kedge_targets.backends.onnxruntime.int8 import INTEGER_OPERATORS

    device = target.find("generic-cpu")
    how = registry.compiler(device.backends[0].name).quantized_for(device)[0]
    names = {"int8": "QInt8", "uint8": "QUInt8"}
    return {
        "op_types_to_quantize": list(INTEGER_OPERATORS),
        "per_channel": how.granularity.value == "per-channel",
        "reduce_range": how.reduced_range,
        "activation_type": names[how.activation],
        "weight_type": names[how.weight],
        "extra_options": {"ActivationSymmetric": how.symmetric_activation, "WeightSymmetric": how.weight == "int8"},
    }

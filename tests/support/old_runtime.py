"""Runs a ``.tflite`` in tflite-runtime, for old boards: ``old_runtime.py FILE GIVEN.npy MADE.npy``."""

from __future__ import annotations

import importlib
import sys

import numpy as np


def main() -> None:
    """Run each sample of a file with one input and one output, and save the outputs as floats."""
    file, given, made = sys.argv[1:4]
    kind = importlib.import_module("tflite_runtime.interpreter")
    interpreter = kind.Interpreter(model_path=file, num_threads=1)
    interpreter.allocate_tensors()
    (source,), (answer,) = interpreter.get_input_details(), interpreter.get_output_details()
    rows = []
    for sample in np.load(given):
        interpreter.set_tensor(source["index"], _stored(sample[None], source))
        interpreter.invoke()
        scale, zero = answer["quantization"]
        row = interpreter.get_tensor(answer["index"])
        rows.append((row.astype(np.float32) - zero) * scale if row.dtype == np.int8 else row)
    np.save(made, np.concatenate(rows))


def _stored(sample: np.ndarray, tensor: dict) -> np.ndarray:  # type: ignore[type-arg]
    if tensor["dtype"] is not np.int8:
        return sample
    scale, zero = tensor["quantization"]
    steps: np.ndarray = np.clip(np.rint(sample / scale) + zero, -128, 127).astype(np.int8)
    return steps


main()

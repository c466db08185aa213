"""Bare process: quantize with ONNX Runtime as Kedge's backend does, evaluate both models, print spans as JSON.

Run as ``python quantize.py MODEL CALIBRATION.npz EVALUATION.npz OUT``; imports nothing of Kedge.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    model, calibration, evaluation, out = (Path(argument) for argument in sys.argv[1:5])
    settings = json.loads(sys.argv[5])
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = np.load(calibration)["input"].astype(np.float32)
    prepared = out.with_suffix(".prepared.onnx")
    quant_pre_process(str(model), str(prepared))
    name = onnxruntime.InferenceSession(str(model)).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(samples)

        def get_next(self) -> dict | None:
            row = next(self.rows, None)
            return None if row is None else {name: row[None]}

    start = time.perf_counter()
    quantize_static(
        str(prepared),
        str(out),
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=settings["op_types_to_quantize"],
        per_channel=settings["per_channel"],
        reduce_range=settings["reduce_range"],
        activation_type=QuantType[settings["activation_type"]],
        weight_type=QuantType[settings["weight_type"]],
        extra_options=settings["extra_options"],
    )
    quantize = time.perf_counter() - start

    data = np.load(evaluation)
    values = {}
    for path in (model, out):
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        right = 0
        for row, label in zip(data["input"].astype(np.float32), data["label"], strict=True):
            right += int(session.run(None, {name: row[None]})[0].argmax() == label)
        values[path.name] = right / len(data["label"])
    print(json.dumps({"quantize": quantize, "values": values}))


main()

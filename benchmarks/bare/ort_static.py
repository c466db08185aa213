"""Bare process: ONNX Runtime's ``quantize_static`` on an ONNX file, as its guide has it (pre-processing, QDQ, a scale
for each channel); prints the processor seconds of one attempt.

Run as ``python ort_static.py MODEL CALIBRATION.npz OUT.onnx FLOAT.json``, the last one a list of the nodes that stay in
float; imports nothing of Kedge.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    source, calibration, out, floating = sys.argv[1:5]
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    samples = next(iter(np.load(calibration).values())).astype(np.float32)
    name = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(samples)

        def get_next(self) -> dict | None:
            row = next(self.rows, None)
            return None if row is None else {name: row[None]}

    start = time.process_time()
    prepared = str(Path(out).with_suffix(".prepared.onnx"))
    try:
        quant_pre_process(source, prepared)
    except Exception:  # noqa: BLE001 -- its own advice where sympy knows a shape no further
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_static(
        prepared,
        out,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=json.loads(Path(floating).read_text()),
    )
    print(time.process_time() - start)


main()

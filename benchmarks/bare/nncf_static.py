"""Bare process: NNCF on an ONNX file, as its guide has it (mixed preset), saved as OpenVINO's representation; prints
the processor seconds of one attempt.

Run as ``python nncf_static.py MODEL CALIBRATION.npz OUT.xml``; imports nothing of Kedge.
"""

import contextlib
import io
import sys
import time

import numpy as np


def main() -> None:
    source, calibration, out = sys.argv[1:4]
    import nncf
    import openvino

    samples = next(iter(np.load(calibration).values())).astype(np.float32)
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        model = openvino.Core().read_model(source)
        data = nncf.Dataset([row[None] for row in samples])
        made = nncf.quantize(model, data, preset=nncf.QuantizationPreset.MIXED, subset_size=len(samples))
        openvino.save_model(made, out, compress_to_fp16=False)
    print(time.process_time() - start)


main()

"""Bare process: NNCF on an ONNX file, as its guide has it (mixed preset), saved as OpenVINO's representation; prints
the processor seconds of one attempt.

Run as ``python nncf_static.py MODEL CALIBRATION.npz OUT.xml FLOAT.json``, the last one a list of the nodes that stay in
float; imports nothing of Kedge.
"""

import contextlib
import io
import json
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    source, calibration, out, floating = sys.argv[1:5]
    import nncf
    import openvino

    samples = next(iter(np.load(calibration).values())).astype(np.float32)
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        model = openvino.Core().read_model(source)
        data = nncf.Dataset([row[None] for row in samples])
        there = {node.get_friendly_name() for node in model.get_ops()}
        kept = [name for name in json.loads(Path(floating).read_text()) if name in there]
        made = nncf.quantize(
            model,
            data,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(samples),
            ignored_scope=nncf.IgnoredScope(names=kept) if kept else None,
        )
        openvino.save_model(made, out, compress_to_fp16=False)
    print(time.process_time() - start)


main()

"""Bare process: ai-edge-quantizer on a float .tflite, as its guide has it; prints the processor seconds of one attempt.

Run as ``python edge_quantizer.py FLOAT.tflite CALIBRATION.npz OUT.tflite FLOAT.json``, the last one a list of what
operators in float give; imports nothing of Kedge.
"""

import json
import re
import sys
import time
from pathlib import Path

import numpy as np


def main() -> None:
    source, calibration, out, floating = sys.argv[1:5]
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe

    signatures = Interpreter(source).get_signature_list()
    name, given = next(iter(signatures.items()))
    samples = next(iter(np.load(calibration).values())).astype(np.float32)
    start = time.process_time()
    made = quantizer.Quantizer(source, recipe.static_wi8_ai8())
    for tensor in json.loads(Path(floating).read_text()):
        made.update_quantization_recipe(
            f"^{re.escape(tensor)};",
            qtyping.TFLOperationName.ALL_SUPPORTED,
            algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE,
        )
    found = made.calibrate({name: [{given["inputs"][0]: row[None]} for row in samples]})
    made.quantize(found).export_model(out, overwrite=True)
    print(time.process_time() - start)


main()

"""Bare qonnx: clean a model, execute it again and again.

``python execute_qonnx.py MODEL SAMPLES ANSWERS BATCH`` answers all samples at batch 1 into a file, says ``ready``, and
then prints the milliseconds of one execution of a batch for each line that it reads; nothing of Kedge.
"""

import sys
import time

import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.util.cleanup import cleanup_model

path, samples, answers, batch = sys.argv[1], np.load(sys.argv[2]), sys.argv[3], int(sys.argv[4])


def execute(model, given):
    return execute_onnx(model, {model.graph.input[0].name: given})[model.graph.output[0].name]


single = cleanup_model(ModelWrapper(path))
np.save(answers, np.concatenate([execute(single, sample[None]) for sample in samples]))
timed = single if batch == 1 else cleanup_model(ModelWrapper(path), override_inpsize=batch)
given = np.resize(samples, (batch, *samples.shape[1:]))
execute(timed, given)
print("ready", flush=True)
for _ in sys.stdin:
    start = time.perf_counter()
    execute(timed, given)
    print((time.perf_counter() - start) * 1000, flush=True)

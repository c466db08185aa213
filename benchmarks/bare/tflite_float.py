"""Bare process in the toolchain's environment: onnx2tf and TensorFlow's converter make a float .tflite.

Run as ``python tflite_float.py GRAPH.onnx OUT.tflite``; imports nothing of Kedge.
"""

import sys
from pathlib import Path


def main() -> None:
    import numpy as np
    import onnx
    import onnx2tf
    import onnx2tf.onnx2tf as inner
    import tensorflow as tf

    # It would fetch pictures for its own checks.
    noise = np.zeros((20, 128, 128, 3), np.float32)
    inner.download_test_image_data = lambda: noise
    model = onnx2tf.convert(
        input_onnx_file_path=None,
        onnx_graph=onnx.load(sys.argv[1]),
        output_folder_path=str(Path(sys.argv[2]).parent / "saved"),
        not_use_onnxsim=True,
        not_use_opname_auto_generate=True,
        disable_model_save=True,
        verbosity="error",
    )
    Path(sys.argv[2]).write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())


main()

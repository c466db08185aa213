"""SavedModels and float .tflite files through the import, with the real toolchain, against TensorFlow and LiteRT."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import lowering, toolchains
from tests.support.importing import Importer, answers, close, importer, signature

from kedge.importing import digests
from kedge_protocol.errors import ModelError, UnsupportedOperatorError

__all__ = ["importer"]

MAKE = """
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
import tf_keras as keras

folder = Path(sys.argv[1])
keras.utils.set_random_seed(0)
layers = keras.layers
image = keras.Input((16, 16, 3), name="image")
hidden = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(image)
hidden = layers.DepthwiseConv2D(3, padding="same")(layers.BatchNormalization()(hidden))
hidden = layers.GlobalAveragePooling2D()(layers.MaxPooling2D()(hidden))
model = keras.Model(image, layers.Dense(5, activation="softmax", name="score")(hidden))
samples = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32)
np.savez(folder / "picture.npz", image=samples, score=model(samples).numpy())
model.export(folder / "picture")
def converter():
    return tf.lite.TFLiteConverter.from_keras_model(model)
(folder / "float.tflite").write_bytes(converter().convert())
halved = converter()
halved.optimizations, halved.target_spec.supported_types = [tf.lite.Optimize.DEFAULT], [tf.float16]
(folder / "half.tflite").write_bytes(halved.convert())


class Encoder(tf.Module):
    def __init__(self):
        self.table = tf.Variable(tf.random.stateless_normal((20, 8), (1, 2)))

    @tf.function(input_signature=[
        tf.TensorSpec((None, None), tf.int64, name="ids"), tf.TensorSpec((None, None), tf.int64, name="mask"),
    ])
    def __call__(self, ids, mask):
        weight = tf.cast(mask, tf.float32)[..., None]
        hidden = tf.gather(self.table, ids) * weight
        return {"mean": tf.reduce_sum(hidden, 1) / tf.reduce_sum(weight, 1), "apart": tf.tanh(hidden)}


encoder = Encoder()
tf.saved_model.save(encoder, folder / "encoder")
ids = np.random.default_rng(1).integers(0, 20, (2, 7))
mask = np.ones((2, 7), np.int64)
mask[0, 4:] = 0
made = encoder(tf.constant(ids), tf.constant(mask))
np.savez(folder / "encoder.npz", ids=ids, mask=mask, mean=made["mean"].numpy(), apart=made["apart"].numpy())


class Named(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, 2), tf.float32)])
    def one(self, x):
        return x * 2

    @tf.function(input_signature=[tf.TensorSpec((None, 2), tf.float32)])
    def two(self, x):
        return x * 3


named = Named()
tf.saved_model.save(named, folder / "two", signatures={"one": named.one, "two": named.two})
tf.saved_model.save(named, folder / "none")


class Strange(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4), tf.float32)])
    def __call__(self, x):
        return tf.linalg.svd(x, compute_uv=False)


strange = Strange()
tf.saved_model.save(strange, folder / "strange", signatures=strange.__call__)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models that TensorFlow itself made, in the toolchain."""
    python = toolchains.required("tflite").python
    folder = tmp_path_factory.mktemp("models")
    script = folder / "make.py"
    script.write_text(MAKE)
    made = subprocess.run([str(python), str(script), str(folder)], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr[-3000:]
    return folder


def arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as found:
        return dict(found)


def test_a_saved_model_keeps_its_axes_and_names(importer: Importer, models: Path) -> None:
    made = importer(models / "picture")
    assert made.kind == "TensorFlow SavedModel"
    assert made.notes == ("free axes: batch",)
    assert set(made.tools) == {"tf2onnx", "tensorflow-cpu"}
    inputs, outputs = signature(made.graph)
    assert list(inputs.values()) == [["batch", 16, 16, 3]]
    assert list(outputs.values()) == [["batch", 5]]
    known = arrays(models / "picture.npz")
    assert close(answers(made.graph, {next(iter(inputs)): known["image"]})[0], known["score"])
    assert (made.source_digest, made.size_bytes) == digests.of_path(models / "picture")


def test_a_saved_model_with_two_inputs_two_outputs_and_a_free_length(importer: Importer, models: Path) -> None:
    made = importer(models / "encoder")
    inputs, outputs = signature(made.graph)
    assert inputs["ids"][0] == inputs["mask"][0] == "batch"
    assert all(isinstance(axis, str) for shape in inputs.values() for axis in shape)
    known = arrays(models / "encoder.npz")
    feed = {name: known[name] for name in ("ids", "mask")}
    for name, found in zip(outputs, answers(made.graph, feed), strict=True):
        assert close(found, known[name])


def test_the_batch_of_a_saved_model_is_fixed_on_request(importer: Importer, models: Path) -> None:
    made = importer(models / "picture", batch=1)
    assert made.notes == ("batch fixed to 1 on request", "free axes: none")
    assert list(signature(made.graph)[0].values()) == [[1, 16, 16, 3]]


@pytest.mark.parametrize("name", ["float", "half"])
def test_a_float_file(importer: Importer, models: Path, name: str) -> None:
    made = importer(models / f"{name}.tflite")
    assert made.kind == "TFLite model"
    known = arrays(models / "picture.npz")
    inputs, _ = signature(made.graph)
    found = answers(made.graph, {next(iter(inputs)): known["image"]})[0]
    assert np.allclose(found, known["score"], atol=1e-5 if name == "float" else 2e-3)


@pytest.mark.parametrize(("name", "said"), [("two", "its signatures: one, two"), ("none", "its signatures: none")])
def test_a_saved_model_without_the_signature(importer: Importer, models: Path, name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        importer(models / name)


def test_an_operator_without_a_counterpart(importer: Importer, models: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"node '.*Svd': operator 'Svd' has no counterpart in ONNX"):
        importer(models / "strange")


def test_a_folder_that_only_looks_like_one(importer: Importer, tmp_path: Path) -> None:
    toolchains.required("tflite")
    (tmp_path / "saved_model.pb").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="TensorFlow cannot load it"):
        importer(tmp_path)


def test_a_file_that_is_none(importer: Importer, tmp_path: Path) -> None:
    toolchains.required("tflite")
    path = tmp_path / "model.tflite"
    path.write_bytes(b"not a flat buffer at all")
    with pytest.raises(ModelError, match=r"is no \.tflite file"):
        importer(path)


@pytest.mark.shared_data
def test_the_shared_float_file_keeps_its_accuracy(importer: Importer, shared_data: Path) -> None:
    toolchains.required("tflite")
    made = importer(shared_data / "models/ic_resnet8_float.tflite")
    assert signature(made.graph) == ({"input_1": ["batch", 32, 32, 3]}, {"Identity": ["batch", 10]})
    with np.load(shared_data / "eval/ic.npz") as data:
        samples, labels = data["input"].astype(np.float32), data["label"]
    found = answers(made.graph, {"input_1": samples})[0]
    assert lowering.top1(found, labels) == pytest.approx(0.855)
    # The ONNX file of the same network was derived on another way.
    assert np.allclose(found, lowering.float_answers(shared_data / "models/ic_resnet8.onnx", samples), atol=1e-4)


@pytest.mark.shared_data
@pytest.mark.parametrize("name", ["ic_resnet8_int8", "kws_dscnn_int8", "person_detect_rejected_by_litert"])
def test_a_quantized_file_is_refused(importer: Importer, shared_data: Path, name: str) -> None:
    toolchains.required("tflite")
    with pytest.raises(ModelError, match="is quantized already") as caught:
        importer(shared_data / "models" / f"{name}.tflite")
    assert "float model" in (caught.value.remedy or "")

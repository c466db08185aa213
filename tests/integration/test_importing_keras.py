"""Keras models, read on PyTorch without TensorFlow, through the import, against Keras itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import requirements
from tests.support.importing import Importer, answers, close, importer, signature

from kedge.importing import api
from kedge_protocol.errors import ModelError

__all__ = ["importer"]


@pytest.fixture(scope="module")
def keras(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keras in this process, as the user may have it; its settings stay out of the home folder."""
    requirements.package("keras")
    os.environ["KERAS_HOME"] = str(tmp_path_factory.mktemp("keras"))
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    keras.utils.set_random_seed(0)
    return keras


@pytest.fixture(scope="module")
def picture(keras: Any) -> Any:
    """NHWC pictures to classes."""
    layers = keras.layers
    image = keras.Input((16, 16, 3), name="image")
    hidden = layers.Conv2D(8, 3, strides=2, padding="same", activation="relu")(image)
    hidden = layers.BatchNormalization()(hidden)
    hidden = layers.DepthwiseConv2D(3, padding="same")(hidden)
    hidden = layers.MaxPooling2D()(layers.ReLU(6.0)(hidden))
    hidden = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(hidden))
    return keras.Model(image, layers.Dense(5, activation="softmax", name="score")(hidden))


def saved(model: Any, folder: Path) -> Path:
    path = folder / "model.keras"
    model.save(path)
    return path


def test_a_picture_classifier_keeps_its_axes(importer: Importer, picture: Any, tmp_path: Path) -> None:
    made = importer(saved(picture, tmp_path))
    assert made.kind == "Keras model"
    assert made.notes == ("free axes: batch",)
    assert set(made.tools) >= {"keras", "torch"}
    assert signature(made.graph) == ({"image": ["batch", 16, 16, 3]}, {"score": ["batch", 5]})
    images = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32)
    assert close(answers(made.graph, {"image": images})[0], picture.predict(images, verbose=0))


def test_the_batch_is_fixed_on_request(importer: Importer, picture: Any, tmp_path: Path) -> None:
    made = importer(saved(picture, tmp_path), batch=1)
    assert made.notes == ("batch fixed to 1 on request", "free axes: none")
    assert signature(made.graph)[0] == {"image": [1, 16, 16, 3]}


def test_a_model_given_as_an_object(importer: Importer, picture: Any) -> None:
    images = np.random.default_rng(0).random((2, 16, 16, 3), dtype=np.float32)
    made = importer(picture, {"image": images})
    assert close(answers(made.graph, {"image": images})[0], picture.predict(images, verbose=0))


def test_several_inputs_outputs_and_integers(importer: Importer, keras: Any, tmp_path: Path) -> None:
    layers = keras.layers
    ids, numbers = keras.Input((6,), dtype="int64", name="ids"), keras.Input((4,), name="numbers")
    words = layers.Flatten()(layers.MultiHeadAttention(2, 4)(*[layers.Embedding(10, 8)(ids)] * 2))
    both = layers.Concatenate()([words, numbers])
    model = keras.Model([ids, numbers], [layers.Dense(2, name="first")(both), layers.Dense(3, name="second")(both)])
    made = importer(saved(model, tmp_path))
    assert signature(made.graph) == (
        {"ids": ["batch", 6], "numbers": ["batch", 4]},
        {"first": ["batch", 2], "second": ["batch", 3]},
    )
    rng = np.random.default_rng(0)
    feed = {"ids": rng.integers(0, 10, (3, 6)), "numbers": rng.random((3, 4), dtype=np.float32)}
    for mine, theirs in zip(
        answers(made.graph, feed), model.predict([feed["ids"], feed["numbers"]], verbose=0), strict=True
    ):
        assert close(mine, theirs)


def test_a_free_length_stays_free(importer: Importer, keras: Any, tmp_path: Path) -> None:
    layers = keras.layers
    sound = keras.Input((None, 4), name="sound")
    hidden = layers.GlobalAveragePooling1D()(layers.Conv1D(8, 3, padding="same", activation="relu")(sound))
    model = keras.Model(sound, layers.Dense(2, name="score")(hidden))
    made = importer(saved(model, tmp_path))
    assert made.notes == ("free axes: batch, sound_1",)
    for count, length in ((1, 20), (3, 11)):
        samples = np.random.default_rng(0).random((count, length, 4), dtype=np.float32)
        assert close(answers(made.graph, {"sound": samples})[0], model.predict(samples, verbose=0))


def test_a_file_that_is_none(importer: Importer, tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    path.write_bytes(b"no archive")
    with pytest.raises(ModelError, match="Keras cannot load it") as caught:
        importer(path)
    assert caught.value.where == str(path)


def test_a_lambda_is_not_run(importer: Importer, keras: Any, tmp_path: Path) -> None:
    image = keras.Input((4,), name="x")
    model = keras.Model(image, keras.layers.Lambda(lambda x: x * 2)(image))
    with pytest.raises(ModelError, match="Keras cannot load it"):
        importer(saved(model, tmp_path))


def test_an_old_h5_is_read_where_the_user_trusts_it(picture: Any, tmp_path: Path) -> None:
    picture.save(tmp_path / "model.h5")
    with pytest.raises(ModelError, match=r"may hold code that runs when it is read.*--trust-pickle"):
        api.import_model(tmp_path / "model.h5", workdir=tmp_path / "work")
    made = api.import_model(tmp_path / "model.h5", workdir=tmp_path / "work", trust_pickle=True)
    images = np.random.default_rng(0).random((3, 16, 16, 3), dtype=np.float32)
    assert close(answers(made.graph, {"image": images})[0], picture.predict(images, verbose=0))

"""Networks of today that nobody has trained: ConvNeXt, ViT and EfficientNet of transformers, a MobileNetV2 of Keras.

Their weights are fresh. Batch norms have seen photos, and the last layer is fitted by least squares to tell the photos
apart, so that answers mean something. None of them is large.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support import foreign, photos

Array = npt.NDArray[Any]

SIZE = 64
_FITTED, _FITTED_SEED = 480, 31
_AT_ONCE = 32
_RIDGE = 1e-2
_SHARP = 8.0
"""By what the fitted scores, near 0 and 1, are multiplied: a softmax then tells them apart."""


def pictures(count: int, seed: int, *, size: int = SIZE) -> tuple[Array, Array]:
    """Crops of all photos in turn, float32 count x 3 x size x size in 0..1, and which photo each is of."""
    return photos.crops(count, size, seed=seed), np.arange(count) % len(photos.photos())


def torch_network(name: str) -> Any:
    """``convnext``, ``vit`` or ``efficientnet``: a ``torch.nn.Module`` from pictures to logits, in evaluation mode."""
    foreign.importable("transformers", "huggingface-hub", "regex")
    import torch
    import transformers

    torch.manual_seed(0)
    classes = len(photos.photos())
    made: dict[str, Callable[[], Any]] = {
        "convnext": lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(depths=[1, 1, 3, 1], hidden_sizes=[24, 48, 96, 192], image_size=SIZE,
                                        layer_scale_init_value=0.3, num_labels=classes)
        ),
        "vit": lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=SIZE, patch_size=8, hidden_size=96, num_hidden_layers=4,
                                   num_attention_heads=3, intermediate_size=384, num_labels=classes)
        ),
        "efficientnet": lambda: transformers.EfficientNetForImageClassification(
            transformers.EfficientNetConfig(image_size=SIZE, width_coefficient=0.5, depth_coefficient=0.5,
                                            hidden_dim=640, num_labels=classes)
        ),
    }  # fmt: skip

    class Logits(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, whole: Any) -> None:
            super().__init__()
            self.whole = whole

        def forward(self, pictures: Any) -> Any:
            return self.whole(pixel_values=pictures).logits

    network = Logits(made[name]())
    for part in network.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight)
        elif isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(part.weight)  # transformers draws it around 0, and no signal is left behind the last
    pixels, which = pictures(_FITTED, _FITTED_SEED)
    parts = [torch.from_numpy(pixels[start : start + _AT_ONCE]) for start in range(0, len(pixels), _AT_ONCE)]
    head = network.whole.classifier
    seen: list[Array] = []
    with torch.no_grad():
        network.train()
        for part in parts:
            network(part)
        network.eval()
        handle = head.register_forward_pre_hook(lambda _, given: seen.append(given[0].numpy()))
        for part in parts:
            network(part)
        handle.remove()
        weight, bias = _fitted(np.concatenate(seen), which)
        head.weight.copy_(torch.from_numpy(weight))
        head.bias.copy_(torch.from_numpy(bias))
    return network


def keras_application(path: Path) -> Any:
    """A MobileNetV2 of ``keras.applications``, saved at ``path``; takes pictures NHWC in -1..1, gives probabilities."""
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras

    keras.utils.set_random_seed(0)
    model = keras.applications.MobileNetV2((SIZE, SIZE, 3), alpha=0.35, weights=None, classes=len(photos.photos()))
    rng = np.random.default_rng(0)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.5
        elif isinstance(layer, (keras.layers.Conv2D, keras.layers.DepthwiseConv2D)):
            (kernel,) = layer.get_weights()
            inner = kernel.shape[:2] if isinstance(layer, keras.layers.DepthwiseConv2D) else kernel.shape[:3]
            layer.set_weights([rng.normal(0, np.sqrt(2 / np.prod(inner)), kernel.shape).astype(np.float32)])
    pixels, which = pictures(_FITTED, _FITTED_SEED)
    pixels = channels_last(pixels)
    for start in range(0, len(pixels), _AT_ONCE):
        model(pixels[start : start + _AT_ONCE], training=True)
    features = keras.Model(model.input, model.layers[-2].output).predict(pixels, verbose=0)
    weight, bias = _fitted(np.asarray(features), which)
    model.layers[-1].set_weights([weight.T, bias])
    model.save(path)
    return model


def channels_last(pixels: Array) -> Array:
    """Pictures as the Keras model takes them."""
    return np.ascontiguousarray(pixels.transpose(0, 2, 3, 1) * 2 - 1)


def _fitted(features: Array, which: Array) -> tuple[Array, Array]:
    """Weights, classes x features, and biases of a layer that tells the photos apart, by ridge regression."""
    features = features.astype(np.float64)
    middle, spread = features.mean(axis=0), features.std(axis=0)
    spread += 1e-3 * spread.max()
    given = (features - middle) / spread
    wanted = np.eye(int(which.max()) + 1)[which]
    ridge = _RIDGE * len(given) * np.eye(given.shape[1])
    weight = np.linalg.solve(given.T @ given + ridge, given.T @ (wanted - wanted.mean(axis=0))).T
    bias = wanted.mean(axis=0) - weight @ (middle / spread)
    return (_SHARP * weight / spread).astype(np.float32), (_SHARP * bias).astype(np.float32)

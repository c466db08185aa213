"""A model that is hard to quantize: its activations have outliers, so that int8 collapses whatever scales its weights
have."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

from kedge_targets.graph import model_writer

Array = npt.NDArray[Any]

OUTLIER = 3000.0
"""What the loud channel holds; the others stay below about 10."""
LOUD = "second"
"""The layer that reads it."""


@dataclass(frozen=True)
class Hard:
    """Files of the model and its data sets, disjoint."""

    model: Path
    calibration: Path
    evaluation: Path


def made(folder: Path, *, homogeneous: bool = True, loud_units: int = 1) -> Hard:
    """A classifier of scikit-learn's digits with one hidden channel that is always loud and that the next layer all but
    cancels: as large language models have them (Dettmers et al., LLM.int8(), 2022). One scale for the whole activation
    leaves the other channels no levels, and scales for each channel of the weights do not help.

    Args:
        homogeneous: whether the layers are joined by Relu, across which scales can be moved; else by a steep SiLU,
            which lets no equalization through.
        loud_units: how many hidden channels are loud.
    """
    rng = np.random.default_rng(3)
    data = load_digits()
    order = rng.permutation(len(data.target))
    images = (data.images.reshape(len(order), 64) / 16.0).astype(np.float32)[order]
    labels = data.target[order].astype(np.int64)
    hidden, deeper, scores = _trained(images[:1000], labels[:1000])
    # More units: a large bias, which the next layer takes back by its own, and next to no weights. Without any they
    # would be constants, which the compiler folds away.
    faint = np.random.default_rng(4).normal(0, 0.01, (64, loud_units)).astype(np.float32)
    w1 = np.concatenate([hidden[0], faint], axis=1)
    b1 = np.append(hidden[1], np.full(loud_units, OUTLIER, np.float32))
    loud = rng.normal(0, 0.02, (loud_units, deeper[0].shape[1])).astype(np.float32)
    w2 = np.concatenate([deeper[0], loud])
    b2 = deeper[1] - OUTLIER * loud.sum(axis=0)
    weights = {"w1": w1, "b1": b1, "w2": w2, "b2": b2.astype(np.float32), "w3": scores[0], "b3": scores[1]}
    if not homogeneous:
        weights["steep"] = np.float32([20.0])
    node = helper.make_node
    nodes = [
        node("Gemm", ["image", "w1", "b1"], ["h1"], name="first"),
        *(
            [node("Relu", ["h1"], ["r1"], name="first_relu")]
            if homogeneous
            else [
                node("Mul", ["h1", "steep"], ["s1"], name="steepened"),
                node("Sigmoid", ["s1"], ["g1"], name="gate"),
                node("Mul", ["h1", "g1"], ["r1"], name="gated"),
            ]
        ),
        node("Gemm", ["r1", "w2", "b2"], ["h2"], name=LOUD),
        node("Relu", ["h2"], ["r2"], name="second_relu"),
        node("Gemm", ["r2", "w3", "b3"], ["scores"], name="third"),
    ]
    graph = helper.make_graph(
        nodes,
        "hard",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 10])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model)
    found = Hard(folder / "hard.onnx", folder / "calibration.npz", folder / "evaluation.npz")
    model_writer.save(model, found.model)
    np.savez(found.calibration, image=images[1000:1200])
    np.savez(found.evaluation, image=images[1200:], label=labels[1200:])
    return found


def _trained(images: Array, labels: Array) -> list[tuple[Array, Array]]:
    """Weights [in, out] and biases of three layers, by scikit-learn."""
    from sklearn.neural_network import MLPClassifier

    network = MLPClassifier((48, 48), max_iter=120, random_state=1, alpha=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it need not converge
        network.fit(images, labels)
    return [
        (w.astype(np.float32), b.astype(np.float32)) for w, b in zip(network.coefs_, network.intercepts_, strict=True)
    ]

"""``ic_resnet8`` with a head that was trained on: on pictures without one class, which it then hardly ever names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

WORSE = 3
"""The class (a cat) that the training had none of."""


def retrain(model: Path, out: Path, pictures: np.ndarray[Any, Any]) -> None:
    """Train the last layer by gradient descent on what the network itself says of pictures, where all that it takes for
    one class is missing.

    Args:
        model: the trained network, whose last layer is a ``Gemm`` of the features ``[samples, features]``.
        out: where the retrained one is written.
    """
    graph = onnx.load(model)
    head = next(node for node in graph.graph.node if node.op_type == "Gemm")
    stored = {one.name: one for one in graph.graph.initializer}
    weights, bias = (numpy_helper.to_array(stored[name]).astype(np.float64) for name in head.input[1:])
    features = _features(graph, head.input[0], pictures)
    inputs = features.astype(np.float64)
    wanted = _shares(inputs @ weights + bias)
    kept = wanted.argmax(axis=1) != WORSE
    inputs, wanted = inputs[kept], wanted[kept]
    wanted[:, WORSE] = 0.0
    wanted /= wanted.sum(axis=1, keepdims=True)
    for _ in range(3000):
        error = (_shares(inputs @ weights + bias) - wanted) / len(inputs)
        weights -= 0.5 * inputs.T @ error
        bias -= 0.5 * error.sum(axis=0)
    for name, array in zip(head.input[1:], (weights, bias), strict=True):
        stored[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))
    onnx.save(graph, out)


def answers(model: Path, pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Classes of a model's answers."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    scores = np.concatenate([session.run(None, {session.get_inputs()[0].name: one[None]})[0] for one in pictures])
    classes: np.ndarray[Any, Any] = scores.argmax(axis=1)
    return classes


def _shares(scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares: np.ndarray[Any, Any] = raised / raised.sum(axis=1, keepdims=True)
    return shares


def _features(graph: onnx.ModelProto, name: str, pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    asked = session.get_inputs()[0].name
    return np.concatenate([session.run([name], {asked: one[None]})[0] for one in pictures])

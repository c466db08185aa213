"""Converts scikit-learn estimators and pipelines with skl2onnx."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.errors import MissingDependencyError, ModelError
from kedge_protocol.packages import pip_install

Array = np.ndarray[Any, Any]

INPUT = "input"
_OPSETS = {"": 18, "ai.onnx.ml": 3}


def is_estimator(model: object) -> bool:
    """Return whether an object is scikit-learn's, without importing scikit-learn."""
    does = hasattr(model, "predict") or hasattr(model, "transform")
    return hasattr(model, "get_params") and does and not hasattr(model, "state_dict")


def to_onnx(estimator: Any, path: Path, *, where: str) -> None:
    """Write a fitted estimator as ONNX with one input, ``input`` [N, features] in float32.

    Raises:
        MissingDependencyError: skl2onnx is not installed.
        ModelError: the estimator is not fitted, or a part of it has no counterpart in ONNX.
    """
    try:
        import skl2onnx
        from skl2onnx.common.data_types import FloatTensorType
    except ImportError as error:
        raise MissingDependencyError(
            f"reading scikit-learn's models needs {error.name or 'skl2onnx'}",
            remedy=f"Install it with {pip_install('sklearn')}",
        ) from error
    features = getattr(estimator, "n_features_in_", None)
    if features is None:
        raise ModelError(
            f"{type(estimator).__name__} does not know its features",
            where=where,
            remedy="Fit it before it is saved; a pipeline's first step must know n_features_in_",
        )
    types = [(INPUT, FloatTensorType([None, int(features)]))]
    try:
        try:  # plain names and tensors, where the converter of this class knows the option
            plain = {id(estimator): {"zipmap": False}} if hasattr(estimator, "classes_") else None
            model = skl2onnx.to_onnx(estimator, initial_types=types, options=plain, target_opset=_OPSETS)
        except NameError:
            model = skl2onnx.to_onnx(estimator, initial_types=types, target_opset=_OPSETS)
    except Exception as error:
        raise ModelError(
            f"skl2onnx cannot convert it: {' '.join(str(error).split())[:300] or type(error).__name__}",
            where=where,
            remedy="XGBoost, LightGBM and CatBoost export themselves (onnxmltools): give that .onnx file; columns of "
            "texts have no place on a device: encode them before",
        ) from error
    if _is_two_sided(estimator):
        del model.graph.output[1:]
    path.write_bytes(model.SerializeToString())


def _is_two_sided(estimator: Any) -> bool:
    """Return whether the estimator decides between two classes by one signed distance, without probabilities: skl2onnx
    writes that in three ways, one of them (SVC) with the larger score for the other class, so only the label is
    reliable."""
    classes = getattr(estimator, "classes_", ())
    numbers = len(classes) == 2 and np.asarray(classes).dtype.kind in "iub"
    return numbers and not hasattr(estimator, "predict_proba")


def answers(estimator: Any, feed: Mapping[str, Array], outputs: list[str]) -> list[Array]:
    """Return the estimator's results for the outputs of a graph of :func:`to_onnx`: ``label``, scores, or a value."""
    (given,) = feed.values()
    found = []
    for name in outputs:
        if name in ("label", "output_label"):
            labels = np.asarray(estimator.predict(given))
            found.append(
                labels if hasattr(estimator, "classes_") or hasattr(estimator, "transform") else labels[:, None]
            )
            continue
        ways = ("predict_proba", "decision_function", "transform", "predict")
        does = next(way for way in ways if hasattr(estimator, way) and (way != "decision_function" or len(outputs) > 1))
        found.append(np.asarray(getattr(estimator, does)(given), np.float32).reshape(len(given), -1))
    return found


def example(estimator: Any, samples: Mapping[str, Array]) -> Array:
    """Return two or more rows to compare on: the user's samples, or random numbers around 0 if there are none."""
    for array in samples.values():
        if array.ndim == 2 and array.shape[1] == estimator.n_features_in_:
            return np.ascontiguousarray(array, np.float32)
    return np.random.default_rng(0).normal(size=(2, int(estimator.n_features_in_))).astype(np.float32)


def tools() -> dict[str, str]:
    """Return the versions of the packages that convert the model."""
    return {name: importlib.metadata.version(name) for name in ("scikit-learn", "skl2onnx")}

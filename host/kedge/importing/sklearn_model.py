"""Converts scikit-learn estimators and pipelines with skl2onnx."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Mapping
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


def to_onnx(estimator: Any, path: Path, feed: Mapping[str, Array], *, where: str) -> None:
    """Write a fitted estimator as ONNX, with inputs as ``feed`` has them (:func:`example`).

    Raises:
        MissingDependencyError: skl2onnx is not installed.
        ModelError: a part of the estimator has no counterpart in ONNX.
    """
    try:
        import skl2onnx
        from skl2onnx.common.data_types import FloatTensorType, StringTensorType
    except ImportError as error:
        raise MissingDependencyError(
            f"reading scikit-learn's models needs {error.name or 'skl2onnx'}",
            remedy=f"Install it with {pip_install('sklearn')}",
        ) from error
    types = [
        (name, (StringTensorType if array.dtype.kind == "U" else FloatTensorType)([None, *array.shape[1:]]))
        for name, array in feed.items()
    ]
    _prepare(estimator)
    options = {id(one): {"tokenexp": token} for one in _parts(estimator) if (token := _token(one)) is not None}
    try:
        try:  # plain names and tensors, where the converter of this class knows the option
            plain = {id(estimator): {"zipmap": False}} if hasattr(estimator, "classes_") else {}
            with _flags_as_numbers():
                model = skl2onnx.to_onnx(
                    estimator, initial_types=types, options={**options, **plain} or None, target_opset=_OPSETS
                )
        except NameError:
            with _flags_as_numbers():
                model = skl2onnx.to_onnx(estimator, initial_types=types, options=options or None, target_opset=_OPSETS)
    except Exception as error:
        raise ModelError(
            f"skl2onnx cannot convert it: {' '.join(str(error).split())[:300] or type(error).__name__}",
            where=where,
            remedy=_remedy(estimator),
        ) from error
    if _gives_label_alone(estimator):
        del model.graph.output[1:]
    shape = _shape_of_answer(estimator)
    if shape is not None:
        _reshape(model, model.graph.output[0].name, shape)
    path.write_bytes(model.SerializeToString())


def _remedy(estimator: Any) -> str:
    parts = _parts(estimator)
    if any(type(one).__module__.partition(".")[0] in ("xgboost", "lightgbm", "catboost") for one in parts):
        return "XGBoost, LightGBM and CatBoost export themselves (onnxmltools): give that .onnx file"
    if any(hasattr(one, "token_pattern") for one in parts):
        return "Of text vectorizers skl2onnx converts those of words, without strip_accents"
    return (
        "Fit it without the part that is named, and let the application compute that part (a FunctionTransformer, the "
        "inverse of a TransformedTargetRegressor), or take another estimator"
    )


def _shape_of_answer(estimator: Any) -> list[int] | None:
    """Return the shape that the first output must be given, since skl2onnx (1.20) writes another: the labels of
    quadratic discriminants and of pairs of classes are [1, N] and [N, 1], several numbers of a network one column."""
    for part in _parts(estimator):
        kind = type(part).__name__
        if kind in ("QuadraticDiscriminantAnalysis", "OneVsOneClassifier"):
            return [-1]
        if kind == "MLPRegressor" and part.n_outputs_ > 1:
            return [-1, part.n_outputs_]
    return None


def _reshape(model: Any, output: str, shape: list[int]) -> None:
    from onnx import helper, numpy_helper

    flat = f"{output}/before"
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [flat if name == output else name for name in names]
    model.graph.initializer.append(numpy_helper.from_array(np.array(shape, np.int64), f"{output}/shape"))
    model.graph.node.append(helper.make_node("Reshape", [flat, f"{output}/shape"], [output]))


def _prepare(estimator: Any) -> None:
    """Set what skl2onnx refuses though it changes no prediction: the forms in which a vote and bins hand on their
    numbers."""
    for part in _parts(estimator):
        if hasattr(part, "flatten_transform"):
            part.flatten_transform = False
        if getattr(part, "encode", None) == "onehot":
            part.encode = "onehot-dense"


@contextlib.contextmanager
def _flags_as_numbers() -> Iterator[None]:
    """Let skl2onnx (1.20) write trees with missing values: it gives their flags as booleans, which onnx (1.23) refuses
    as elements of an attribute."""
    from skl2onnx.common import _container as container

    original = container.make_node

    def make_node(*names: Any, **attributes: Any) -> Any:
        plain = {name: _numbers(value) for name, value in attributes.items()}
        return original(*names, **plain)

    container.make_node = make_node
    try:
        yield
    finally:
        container.make_node = original


def _numbers(value: Any) -> Any:
    flags = isinstance(value, (list, np.ndarray)) and any(isinstance(one, (bool, np.bool_)) for one in value)
    return [int(one) for one in value] if flags else value


_TOKENS = {r"(?u)\b\w\w+\b": r"[\p{L}\p{N}_]{2,}", r"(?u)\b\w+\b": r"[\p{L}\p{N}_]+"}
"""A vectorizer's pattern → the same for ONNX Runtime, where ``\\w`` is ASCII alone (RE2): skl2onnx's own choice cuts
words at letters with accents."""


def _token(part: object) -> str | None:
    if getattr(part, "analyzer", None) != "word" or not hasattr(part, "vocabulary_"):
        return None
    return _TOKENS.get(str(getattr(part, "token_pattern", "")))


def _parts(estimator: Any) -> list[Any]:
    """Return an estimator and all that it is made of."""
    found, waiting = [], [estimator]
    while waiting:
        one = waiting.pop()
        found.append(one)
        for held in (getattr(one, "steps", None), getattr(one, "transformers_", None)):
            waiting += [item[1] for item in held or () if hasattr(item[1], "get_params")]
        waiting += [item[1] for item in getattr(one, "transformer_list", None) or () if hasattr(item[1], "get_params")]
        inner = getattr(one, "estimator", None)
        waiting += [inner] if hasattr(inner, "get_params") else []
    return found


def _gives_label_alone(estimator: Any) -> bool:
    """Return whether only the label is to be kept of a classifier.

    One that decides between two classes by a signed distance, without probabilities, is written in three ways by
    skl2onnx, one of them (SVC) with the larger score for the other class. A vote of labels has no scores, though
    skl2onnx writes some. One with several labels has a list of scores, of unlike widths.
    """
    classes = getattr(estimator, "classes_", ())
    if isinstance(classes, list):
        return True
    if hasattr(estimator, "predict_proba"):
        return False
    numbers = len(classes) == 2 and np.asarray(classes).dtype.kind in "iub"
    pairs = any(type(one).__name__ == "OneVsOneClassifier" for one in _parts(estimator))  # skl2onnx writes no scores
    return numbers or pairs or (len(classes) > 0 and not hasattr(estimator, "decision_function"))


def answers(estimator: Any, feed: Mapping[str, Array], outputs: list[str]) -> list[Array]:
    """Return the estimator's results for the outputs of a graph of :func:`to_onnx`: ``label``, scores, or a value."""
    from sklearn.base import is_regressor

    given = _table(estimator, feed)
    count = len(next(iter(feed.values())))
    found = []
    for name in outputs:
        if name in ("label", "output_label"):
            labels = np.asarray(estimator.predict(given))
            found.append(
                labels if hasattr(estimator, "classes_") or hasattr(estimator, "transform") else labels[:, None]
            )
            continue
        ways = ["predict_proba", "decision_function", "transform", "predict"]
        if is_regressor(estimator):
            ways = ["predict"]  # a vote of regressors, or partial least squares, transform too
        does = next(way for way in ways if hasattr(estimator, way) and (way != "decision_function" or len(outputs) > 1))
        value = getattr(estimator, does)(given)
        value = value.toarray() if hasattr(value, "toarray") else value  # transformers of texts give sparse ones
        found.append(np.asarray(value, np.float32).reshape(count, -1))
    return found


def _table(estimator: Any, feed: Mapping[str, Array]) -> Any:
    """Return the samples as the estimator takes them."""
    if len(feed) == 1:
        (only,) = feed.values()
        return only
    names = getattr(estimator, "feature_names_in_", None)
    if names is not None:
        try:
            import pandas
        except ImportError as error:
            raise MissingDependencyError(
                "the estimator was fitted on a table with named columns, and pandas is not installed",
                remedy="Install it with pip install pandas",
            ) from error
        return pandas.DataFrame({name: array.reshape(-1) for name, array in feed.items()})
    table = np.empty((len(next(iter(feed.values()))), len(feed)), dtype=object)
    for at, column in enumerate(feed.values()):
        table[:, at] = column.reshape(-1)
    return table


def example(estimator: Any, samples: Mapping[str, Array], *, where: str) -> dict[str, Array]:
    """Return the inputs that the graph shall have, with two or more rows each to compare on.

    It is ``input`` [N, features] in float32; ``input`` [N] or [N, features] of texts, where the user's samples are
    texts; or one input [N, 1] for each column, by its name, where columns of texts stand beside columns of numbers, or
    the estimator itself asks for columns by name.

    Args:
        samples: the user's, by the names of his arrays or columns; without them the rows are random numbers around 0.

    Raises:
        ModelError: neither the estimator nor the samples tell how many features there are, or a column is missing.
    """
    features = getattr(estimator, "n_features_in_", None)
    names = [str(name) for name in getattr(estimator, "feature_names_in_", ())]
    texts = [name for name, array in samples.items() if array.dtype.kind == "U"]
    if names and (texts or _asks_by_name(estimator)):
        if missing := [name for name in names if name not in samples]:
            raise ModelError(
                f"was fitted on a column {missing[0]!r}, which the data set lacks",
                where=where,
                remedy=f"Give a CSV with a header, or one array for each of {', '.join(names)}",
            )
        return {name: _column(samples[name]) for name in names}
    if texts and len(samples) == 1:
        return {INPUT: np.ascontiguousarray(samples[texts[0]])}
    if texts and len(texts) == len(samples) == features:
        return {INPUT: np.concatenate([_column(array) for array in samples.values()], axis=1)}
    if texts:
        return {name: _column(array) for name, array in samples.items()}
    if features is None:
        raise ModelError(
            f"{type(estimator).__name__} does not know its features",
            where=where,
            remedy="Fit it before it is saved; one that begins with a vectorizer of texts needs samples of texts",
        )
    for array in samples.values():
        if array.ndim == 2 and array.shape[1] == features:
            return {INPUT: np.ascontiguousarray(array, np.float32)}
    if len(samples) == features and all(array.ndim == 1 for array in samples.values()):
        return {INPUT: np.stack([np.asarray(array, np.float32) for array in samples.values()], axis=1)}
    return {INPUT: np.random.default_rng(0).normal(size=(2, int(features))).astype(np.float32)}


def _column(array: Array) -> Array:
    rows: Array = np.ascontiguousarray(array.reshape(len(array), -1))
    return rows if rows.dtype.kind == "U" else rows.astype(np.float32)


def _asks_by_name(estimator: Any) -> bool:
    """Return whether a part of the estimator chooses its columns by their names."""
    return any(
        isinstance(column, str)
        or (isinstance(column, (list, np.ndarray)) and len(column) and isinstance(column[0], str))
        for part in _parts(estimator)
        for _, _, column in getattr(part, "transformers_", None) or ()
    )


def tools() -> dict[str, str]:
    """Return the versions of the packages that convert the model."""
    return {name: importlib.metadata.version(name) for name in ("scikit-learn", "skl2onnx")}

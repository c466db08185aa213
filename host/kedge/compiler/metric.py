"""Metrics: top-1 where there are labels, agreement with the float model where there are none, or the user's own."""

from __future__ import annotations

import enum
import importlib.util
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]
UserMetric = Callable[[Mapping[str, Array], Mapping[str, Array], Array | None], float]

WHERE = "--metric"
"""Where errors of the user's own function are said to be."""
_ROWS = 4096
_UNIT = 1e-3


class Kind(str, enum.Enum):
    """What a metric's value means."""

    TOP1 = "top1"  # share of samples whose largest score is the label's
    AGREEMENT = "agreement"  # share of samples whose largest score is the float model's
    COSINE = "cosine"  # mean cosine between the outputs and the float model's
    USER = "user"  # the user's function


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The metric of one compilation.

    Attributes:
        name: as the report and the bundle have it; ``file.py:function`` without folders for the user's own.
        function: ``path.py:function`` of the user's own.
    """

    kind: Kind
    name: str
    function: str | None = None


def choose(user: str | None, *, labelled: bool, outputs: Mapping[str, Array]) -> Choice:
    """Decide the metric.

    Args:
        user: the ``--metric`` option.
        labelled: whether the evaluation set has labels.
        outputs: of the float model, in its order.

    Raises:
        DatasetError: labels, but the first output holds no class scores.
    """
    if user is not None:
        path, _, function = user.rpartition(":")
        return Choice(kind=Kind.USER, name=f"{Path(path).name}:{function}", function=user)
    first = next(iter(outputs.values()))
    if labelled:
        if first.ndim < 2 or first.shape[-1] < 2:
            shape = "x".join(map(str, first.shape))
            raise DatasetError(
                f"there are labels, but output {next(iter(outputs))!r} of shape {shape} holds no class scores",
                where="evaluation",
                remedy="Give your own --metric file.py:function, or leave the labels out",
            )
        return Choice(kind=Kind.TOP1, name=Kind.TOP1.value)
    kind = Kind.AGREEMENT if class_scores(first) else Kind.COSINE
    return Choice(kind=kind, name=kind.value)


def class_scores(output: Array) -> bool:
    """Whether an output looks like class scores: two axes, several columns, and rows that are not of unit length (as
    embeddings often are)."""
    if output.ndim != 2 or output.shape[1] < 2:
        return False
    rows = np.asarray(output[:_ROWS], dtype=np.float64)
    one_hot = bool((rows.max(axis=1) > 1 - _UNIT).all())
    return one_hot or not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=_UNIT)


def check_labels(labels: Array, output: Array, *, where: str) -> None:
    """Check labels for top-1.

    Raises:
        DatasetError: not whole numbers, not one for each score vector, or outside the classes.
    """
    if labels.dtype.kind not in "iu":
        raise DatasetError(f"label has dtype {labels.dtype}, whole numbers were expected", where=where)
    if labels.shape != output.shape[:-1]:
        have, want = ("x".join(map(str, shape)) for shape in (labels.shape, output.shape[:-1]))
        raise DatasetError(f"label has shape {have}, {want} was expected", where=where)
    classes = output.shape[-1]
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DatasetError(
            f"label holds {low if low < 0 else high}, the model's {classes} classes are 0 to {classes - 1}", where=where
        )


def score(
    choice: Choice,
    outputs: Mapping[str, Array],
    reference: Mapping[str, Array],
    inputs: Mapping[str, Array],
    labels: Array | None,
) -> float:
    """The metric's value.

    Args:
        outputs: output name → real numbers, first axis the sample.
        reference: of the float model, likewise.
        inputs: raw samples.
        labels: as the user gave them.

    Raises:
        ConfigError: the user's function is not there, raises, or gives no finite number.
    """
    if choice.kind is Kind.USER:
        return _users(choice, outputs, inputs, labels)
    name = next(iter(reference))
    if choice.kind is Kind.TOP1 and labels is not None:
        return float(np.mean(np.argmax(outputs[name], axis=-1) == labels))
    if choice.kind is Kind.AGREEMENT:
        return float(np.mean(np.argmax(outputs[name], axis=-1) == np.argmax(reference[name], axis=-1)))
    return cosine(outputs, reference)


def agreement(choice: Choice, outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> float | None:
    """Share of samples whose largest score is the float model's; None where the first output is no class scores."""
    name = next(iter(reference))
    if choice.kind is not Kind.TOP1 and not class_scores(reference[name]):
        return None
    return float(np.mean(np.argmax(outputs[name], axis=-1) == np.argmax(reference[name], axis=-1)))


def cosine(outputs: Mapping[str, Array], reference: Mapping[str, Array]) -> float:
    """Mean over samples of the cosine between all outputs, one after the other, and the reference's.

    Two zero vectors are alike (1); a zero vector and another are not (0). NaNs count as 0.
    """
    count = len(next(iter(reference.values())))
    total = 0.0
    for start in range(0, count, _ROWS):
        dot, left, right = 0.0, 0.0, 0.0
        for name, wanted in reference.items():
            w = np.asarray(wanted[start : start + _ROWS], dtype=np.float64).reshape(-1, int(np.prod(wanted.shape[1:])))
            o = np.asarray(outputs[name][start : start + _ROWS], dtype=np.float64).reshape(w.shape)
            dot = dot + np.einsum("ij,ij->i", o, w)
            left = left + np.einsum("ij,ij->i", o, o)
            right = right + np.einsum("ij,ij->i", w, w)
        product = np.sqrt(np.asarray(left) * np.asarray(right))
        both_zero = (np.asarray(left) == 0) & (np.asarray(right) == 0)
        values = np.where(both_zero, 1.0, np.divide(dot, product, out=np.zeros_like(product), where=product > 0))
        total += float(np.nan_to_num(values, nan=0.0).sum())
    # Sums of float64 may differ in the last digits from machine to machine; the value goes into a digest.
    return round(total / count, 9)


def check_reference(reference: str, where: str = WHERE) -> None:
    """Check the form ``file.py:function``, and that the file is there.

    Raises:
        ConfigError: it is not.
    """
    path, colon, name = reference.rpartition(":")
    if not colon or Path(path).suffix != ".py" or not name.isidentifier():
        raise ConfigError(f"{reference!r} cannot be read", where=where, remedy="Write it as file.py:function")
    if not Path(path).is_file():
        raise ConfigError(f"there is no file {path}", where=where)


def absolute(reference: str) -> str:
    """The same with the file's whole path: the worker may stand elsewhere."""
    path, _, name = reference.rpartition(":")
    return f"{Path(path).absolute()}:{name}"


def load(reference: str) -> UserMetric:
    """The user's function.

    Args:
        reference: ``path.py:function``.

    Raises:
        ConfigError: no such file or function, or the file cannot be imported.
    """
    check_reference(reference)
    path, _, name = reference.rpartition(":")
    file = Path(path)
    spec = importlib.util.spec_from_file_location(f"_kedge_metric_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} cannot be imported", where=WHERE)
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # its own helpers lie beside it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"{path} cannot be imported: {_said(error)}", where=WHERE) from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"{path} has no function {name!r}", where=WHERE)
    found: UserMetric = function
    return found


def _users(choice: Choice, outputs: Mapping[str, Array], inputs: Mapping[str, Array], labels: Array | None) -> float:
    function = load(choice.function or "")
    try:
        value = function(dict(outputs), dict(inputs), labels)
    except Exception as error:
        raise ConfigError(f"{choice.name} raised {_said(error)}", where=WHERE) from error
    if not isinstance(value, (int, float, np.integer, np.floating)) or not math.isfinite(value):
        raise ConfigError(f"{choice.name} gave {value!r}, a finite number was expected", where=WHERE)
    return float(value)


def _said(error: Exception) -> str:
    """An error of the user's code with its line."""
    frames = traceback.extract_tb(error.__traceback__)
    line = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}: {error}{line}"

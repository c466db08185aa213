"""Determines what an output is, from the graph, the data or the user; never from its shape alone.

Class scores are those with a Softmax (or a sigmoid for each class) behind them, those whose labels fit, and those that
the user calls so.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_SUM = 1e-3
_ROWS = 4096
_SHAPING = frozenset(
    {
        "Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather",
        "Expand", "Dropout", "Pad", "Tile", "DequantizeLinear", "QuantizeLinear", "ZipMap",
    }
)  # fmt: skip
"""Operators that move values without changing their meaning."""
_REDUCING = frozenset({"ReduceMean", "ReduceMax", "ReduceMin"})
"""Operators whose result lies among the values that they reduce: probabilities stay probabilities."""
_DISTRIBUTIONS = frozenset(
    {"Softmax", "LogSoftmax", "TreeEnsembleClassifier", "LinearClassifier", "SVMClassifier", "Hardmax"}
)
_SIGMOIDS = frozenset({"Sigmoid", "HardSigmoid"})


class OutputKind(str, enum.Enum):
    """The kind of an output."""

    CLASSES = "class scores"  # the largest of each row is the answer
    PROBABILITY = "probability"  # one number of 0..1 for each sample: yes or no
    PROBABILITIES = "probabilities"  # many numbers of 0..1, a map or a list
    BOXES = "boxes and scores"  # probabilities beside other numbers in one output
    EMBEDDING = "embedding"  # rows of unit length
    RECONSTRUCTION = "reconstruction"  # shaped as an input
    NUMBER = "number"  # one number for each sample
    VALUES = "values"  # any other numbers
    INTEGERS = "integers"  # labels, indices, flags, texts
    PASSED_THROUGH = "input passed through"
    EMPTY = "empty"


@dataclass(frozen=True, kw_only=True)
class GraphEvidence:
    """The operator that computes an output, seen through operators that only move values.

    Attributes:
        distribution: a softmax or a classifier of ``ai.onnx.ml`` gives it.
        sigmoid: a sigmoid gives it, or a part of it.
        mixed: other operators give the rest.
        passed: nothing but an input does.
        reduced: several of its values, of which the mean or an extreme is taken: no longer one score for each class.
    """

    distribution: bool = False
    sigmoid: bool = False
    mixed: bool = False
    passed: bool = False
    reduced: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassifiedOutput:
    """One output and its kind.

    Attributes:
        why: how that is known, in words.
        bounded: whether a part of it is known to be probabilities.
        labelled: whether the labels are of it.
    """

    name: str
    kind: OutputKind
    why: str
    bounded: bool = False
    labelled: bool = False


def graph_evidence(model: onnx.ModelProto) -> dict[str, GraphEvidence]:
    """Return the evidence from the graph for each output, by name."""
    scope = _Scope(model.graph)
    return {value.name: _traced(value.name, scope) for value in model.graph.output}


class _Scope:
    """The tensors of a graph; of a branch of an ``If``, those of the graphs around it too."""

    def __init__(self, graph: onnx.GraphProto, outer: _Scope | None = None) -> None:
        self.inputs: set[str] = {value.name for value in graph.input} | (outer.inputs if outer else set())
        inner = {tensor: (node, self) for node in graph.node for tensor in node.output}
        self.makers: dict[str, tuple[onnx.NodeProto, _Scope]] = {**outer.makers, **inner} if outer else inner


def _traced(name: str, scope: _Scope) -> GraphEvidence:
    ends: set[str] = set()
    reduced = False
    waiting, done = [(name, scope)], set()
    while waiting:
        tensor, around = waiting.pop()
        if (tensor, around) in done:
            continue
        done.add((tensor, around))
        if tensor not in around.makers:
            ends.add("" if tensor in around.inputs else "constant")
            continue
        node, place = around.makers[tensor]
        if node.op_type == "Concat":
            waiting += [(one, place) for one in node.input]
        elif node.op_type == "If":
            at = list(node.output).index(tensor)
            waiting += [(one.g.output[at].name, _Scope(one.g, place)) for one in node.attribute]
        elif node.op_type in _SHAPING | _REDUCING or (node.op_type == "Clip" and node.input[0] in place.makers):
            reduced |= node.op_type in _REDUCING
            waiting.append((node.input[0], place))
        else:
            ends.add(node.op_type)
    ends.discard("constant")
    return GraphEvidence(
        distribution=bool(ends) and ends <= _DISTRIBUTIONS and not reduced,
        sigmoid=bool(ends & (_SIGMOIDS | _DISTRIBUTIONS)),
        mixed=bool(ends - _SIGMOIDS - _DISTRIBUTIONS),
        passed=ends == {""} and not reduced,
        reduced=reduced,
    )


def classify_outputs(
    reference: Mapping[str, Array],
    *,
    graph: Mapping[str, GraphEvidence],
    inputs: Mapping[str, Array],
    labels: Any | None = None,
    named: str | None = None,
    asked: bool = False,
) -> dict[str, ClassifiedOutput]:
    """Return the kind of each output, by name.

    Args:
        reference: the float model's answers, first axis the sample.
        graph: what stands behind each output.
        inputs: raw samples, by input name.
        labels: of the evaluation set.
        named: the output that the user calls class scores.
        asked: whether the user asked for answers to agree (``--min-agreement``) without naming an output: what might
            be class scores then is.
    """
    found = {
        name: _one(name, array, graph.get(name, GraphEvidence()), inputs, named=name == named)
        for name, array in reference.items()
    }
    if labels is not None:
        fitting = _labelled(reference, found, graph, labels)
        if fitting is not None:
            found[fitting] = ClassifiedOutput(
                name=fitting,
                kind=OutputKind.CLASSES,
                why="the labels fit it",
                bounded=found[fitting].bounded,
                labelled=True,
            )
    if asked and not any(one.kind in _ANSWERS for one in found.values()):
        for name, one in found.items():
            if one.kind in (OutputKind.VALUES, OutputKind.EMBEDDING) and columns(reference[name]) > 1:
                found[name] = ClassifiedOutput(
                    name=name, kind=OutputKind.CLASSES, why="--min-agreement asks for its answers"
                )
    return found


_ANSWERS = (OutputKind.CLASSES, OutputKind.PROBABILITY)


def columns(array: Array) -> int:
    """Return how many class scores a row of an output would hold (its last axis); 0 if the sample axis is the only
    one."""
    return int(array.shape[-1]) if array.ndim > 1 else 0


IGNORED = -100
"""A class number that does not count, as of padding in a line of tokens (PyTorch's ``ignore_index``)."""


def fits(array: Array, labels: Any) -> bool:
    """Return whether labels can be classes of an output: whole numbers, one per row, none beyond the last axis."""
    if not isinstance(labels, np.ndarray) or array.dtype.kind != "f":
        return False
    numbers = class_numbers(labels, array)
    if numbers.dtype.kind not in "iu" or columns(array) < 2 or numbers.shape != array.shape[:-1]:
        return False
    counted = numbers[numbers != IGNORED]
    return bool(counted.size) and int(counted.min()) >= 0 and int(counted.max()) < columns(array)


def class_numbers(labels: Any, array: Array) -> Array:
    """Return labels as class numbers, one for each row of an output's scores, where they are that in another form:
    whole numbers stored as real ones or as flags, with an axis of length one more or less, or one-hot rows. Other
    labels are returned as they are."""
    wanted = np.asarray(labels)
    if wanted.dtype.kind not in "iufb" or not wanted.size:
        return wanted
    if wanted.shape == array.shape and columns(array) > 1 and _one_hot(wanted):
        return np.asarray(wanted.argmax(axis=-1))
    wanted, rows = whole_numbers(wanted), array.shape[:-1]
    if wanted.shape != rows and len(wanted) == len(array) and long_axes(wanted.shape) == long_axes(rows):
        wanted = wanted.reshape(rows)
    return wanted


def whole_numbers(labels: Array) -> Array:
    """Return flags, and real numbers that are all whole, as int64; other labels as they are."""
    if labels.dtype.kind == "b" or (labels.dtype.kind == "f" and bool((labels == np.round(labels)).all())):
        return labels.astype(np.int64)
    return labels


def long_axes(shape: tuple[int, ...]) -> list[int]:
    """Return the lengths of the axes of one sample that are longer than one."""
    return [length for length in shape[1:] if length != 1]


def _one_hot(labels: Array) -> bool:
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(axis=-1) == 1).all())


def _labelled(
    reference: Mapping[str, Array],
    found: Mapping[str, ClassifiedOutput],
    graph: Mapping[str, GraphEvidence],
    labels: Any,
) -> str | None:
    """Return the output that the labels belong to. Of several that fit, one with a softmax wins, then the one that the
    float model gets right most often."""
    fitting = [
        name
        for name, array in reference.items()
        if found[name].kind is not OutputKind.PASSED_THROUGH and fits(array, labels)
    ]
    return max(
        fitting,
        key=lambda name: (
            graph.get(name, GraphEvidence()).distribution,
            float(np.mean(np.argmax(reference[name], axis=-1) == class_numbers(labels, reference[name]))),
        ),
        default=None,
    )


def _one(
    name: str, array: Array, graph: GraphEvidence, inputs: Mapping[str, Array], *, named: bool
) -> ClassifiedOutput:
    def is_(kind: OutputKind, why: str, *, bounded: bool = False) -> ClassifiedOutput:
        return ClassifiedOutput(name=name, kind=kind, why=why, bounded=bounded)

    if 0 in array.shape:
        return is_(OutputKind.EMPTY, "it holds nothing")
    if named and array.dtype.kind == "f" and columns(array) > 1:
        return is_(OutputKind.CLASSES, "--metric names it", bounded=_floats(array, graph, inputs, is_).bounded)
    if graph.passed:
        return is_(OutputKind.PASSED_THROUGH, "nothing is computed between an input and it")
    if array.dtype.kind != "f":
        return is_(OutputKind.INTEGERS, f"its numbers are {array.dtype}")
    return _floats(array, graph, inputs, is_)


def _floats(
    array: Array, graph: GraphEvidence, inputs: Mapping[str, Array], is_: Callable[..., ClassifiedOutput]
) -> ClassifiedOutput:
    rows = np.asarray(array[:_ROWS], dtype=np.float64)
    finite = rows[np.isfinite(rows)]
    unit = bool(finite.size and finite.min() >= 0.0 and finite.max() <= 1.0 + _SUM)
    single = array[:1].size == 1
    if graph.distribution and columns(array) > 1:
        return is_(OutputKind.CLASSES, "a softmax gives it", bounded=unit)
    if graph.sigmoid and not graph.mixed and unit:
        if single:
            return is_(OutputKind.PROBABILITY, "a sigmoid gives it", bounded=True)
        if array.ndim == 2 and not graph.reduced and not _like_an_input(array, inputs):
            return is_(OutputKind.CLASSES, "a sigmoid gives each of its scores", bounded=True)
        return is_(OutputKind.PROBABILITIES, "a sigmoid gives it", bounded=True)
    if graph.sigmoid and graph.mixed:
        return is_(OutputKind.BOXES, "a part of it comes from a sigmoid", bounded=True)
    if columns(array) > 1 and unit and np.allclose(rows.sum(axis=-1), 1.0, atol=_SUM):
        return is_(OutputKind.CLASSES, "its rows are probabilities that sum to 1", bounded=True)
    if single:
        return is_(OutputKind.NUMBER, "it is one number for each sample")
    if _like_an_input(array, inputs):
        return is_(OutputKind.RECONSTRUCTION, "it has the shape of an input")
    if columns(array) > 1 and np.allclose(np.linalg.norm(rows, axis=-1), 1.0, atol=_SUM):
        return is_(OutputKind.EMBEDDING, "its rows have unit length")
    return is_(OutputKind.VALUES, "nothing tells more")


def _like_an_input(array: Array, inputs: Mapping[str, Array]) -> bool:
    """Return whether an output has an input's shape, as an autoencoder's has."""
    return any(one.shape == array.shape and one[:1].size > 1 for one in inputs.values())

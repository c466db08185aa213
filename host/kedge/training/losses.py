"""Losses of a student: how far its outputs, attention maps and features are from the teacher's."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch.nn import functional

from kedge_targets.graph import attention as attention_rooms

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor

_TINY = 1e-8
_SUM = 1e-3
_ROWS = 4096


class Kind(str, enum.Enum):
    """The meaning of an output."""

    LOGITS = "logits"  # class scores before a softmax
    PROBABILITIES = "probabilities"  # after it, where what was before cannot be had
    VALUES = "values"  # anything else: regression, embeddings


@dataclass(frozen=True, kw_only=True)
class Head:
    """An output that is compared.

    Attributes:
        output: name of the graph's output.
        tensor: name of the compared tensor: the input of the softmax that makes the output, or the output itself.
        kind: of ``tensor``.
    """

    output: str
    tensor: str
    kind: Kind


def heads(model: onnx.ModelProto, outputs: Mapping[str, Array]) -> list[Head]:
    """Determine how each float output is compared.

    Args:
        model: the student; the teacher has the tensors of the same names.
        outputs: some outputs of the teacher, by name; the first axis is the sample.
    """
    maker = {tensor: node for node in model.graph.node for tensor in node.output}
    found = []
    for name, array in outputs.items():
        if array.dtype.kind != "f" or array.ndim < 1:
            continue
        node = maker.get(name)
        while node is not None and node.op_type in ("Identity", "Cast"):
            node = maker.get(node.input[0])
        if node is not None and node.op_type in ("Softmax", "LogSoftmax") and array.ndim == 2:
            found.append(Head(output=name, tensor=node.input[0], kind=Kind.LOGITS))
        elif _like_class_scores(array):
            rows = np.asarray(array, dtype=np.float64)
            sums_to_one = bool((rows >= 0).all() and np.allclose(rows.sum(axis=1), 1.0, atol=_SUM))
            found.append(Head(output=name, tensor=name, kind=Kind.PROBABILITIES if sums_to_one else Kind.LOGITS))
        else:
            found.append(Head(output=name, tensor=name, kind=Kind.VALUES))
    return found


def _like_class_scores(output: Array) -> bool:
    """Guess whether an output may be class scores: two axes, several columns, and rows that are not of unit length. The
    guess only decides the objective of training; evaluation never guesses (:mod:`kedge.evaluation.kinds`)."""
    if output.ndim != 2 or output.shape[1] < 2:
        return False
    rows = np.asarray(output[:_ROWS], dtype=np.float64)
    one_hot = bool((rows.max(axis=1) > 1 - _SUM).all())
    return one_hot or not np.allclose(np.linalg.norm(rows, axis=1), 1.0, atol=_SUM)


def logits(head: Head, tensor: Tensor) -> Tensor:
    """Return the values to which a softmax would be applied."""
    return torch.log(tensor.clamp_min(_TINY)) if head.kind is Kind.PROBABILITIES else tensor


def soft_labels(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the Kullback-Leibler divergence of the class probabilities at a temperature, times the temperature
    squared, so that gradients keep their size (Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network",
    2015).

    Args:
        student, teacher: logits, classes on the last axis.
    """
    ours = functional.log_softmax(student / temperature, dim=-1)
    theirs = functional.log_softmax(teacher / temperature, dim=-1)
    divergence = functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
    return divergence.mean() * temperature**2


def hard_labels(student: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy with the true classes.

    Args:
        student: logits N x C.
        labels: N integers.
    """
    return functional.cross_entropy(student, labels.long())


def values(student: Tensor, teacher: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the loss of outputs that are not class scores: one minus the cosine, plus the mean square error over the
    teacher's mean square.

    Args:
        student, teacher: N x …; vectors lie along the last axis.
        weight: of each vector (0 for padding), or None.
    """
    if student.ndim < 2:
        student, teacher = student.reshape(len(student), -1), teacher.reshape(len(teacher), -1)
    angle = 1 - functional.cosine_similarity(student, teacher, dim=-1, eps=_TINY)
    error, power = ((student - teacher) ** 2).mean(-1), (teacher**2).mean(-1)
    if student.shape[-1] == 1:  # the cosine of single numbers is their sign
        angle = torch.zeros_like(angle)
    if weight is None:
        weight = torch.ones_like(error)
    total = weight.sum().clamp_min(_TINY)
    relative = (error * weight).sum() / (power * weight).sum().clamp_min(_TINY)
    return (angle * weight).sum() / total + relative


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence of attention maps (after Jiao et al., "TinyBERT", 2020, who use the square
    error).

    Args:
        student, teacher: N x heads x queries x keys, rows that sum to one. If heads were pruned, the means over the
            heads are compared.
    """
    if student.shape != teacher.shape:
        student, teacher = student.mean(1), teacher.mean(1)
    ours, theirs = torch.log(student.clamp_min(_TINY)), torch.log(teacher.clamp_min(_TINY))
    return (teacher * (theirs - ours)).sum(-1).mean()


def features(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean square error over the teacher's mean square (after Romero et al., "FitNets", 2015)."""
    return ((student - teacher) ** 2).mean() / (teacher**2).mean().clamp_min(_TINY)


def attention_maps(model: onnx.ModelProto, compared: Sequence[Head]) -> list[str]:
    """Return the result of each softmax that does not give class scores."""
    taken = {head.tensor for head in compared}
    outputs = {value.name for value in model.graph.output}
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Softmax" and node.input[0] not in taken and node.output[0] not in outputs
    ]


_BLOCK_ENDS = frozenset(
    {"LayerNormalization", "Add", "Relu", "Clip", "HardSwish", "Gelu", "LeakyRelu", "PRelu", "Elu", "Sigmoid", "Tanh"}
)


def block_ends(model: onnx.ModelProto) -> list[str]:
    """Return the tensors at which blocks may end, in the order of the graph, outputs among them: activations,
    normalizations, and additions of branches."""
    held = {tensor.name for tensor in model.graph.initializer}
    held |= {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    scores = set(attention_rooms.before_softmax(model))
    return [
        node.output[0]
        for node in model.graph.node
        if node.op_type in _BLOCK_ENDS
        and node.name not in scores
        and not (node.op_type == "Add" and held & {*node.input})
    ]


def feature_tensors(model: onnx.ModelProto, count: int) -> list[str]:
    """Return up to ``count`` tensors, evenly spread over the depth, at which blocks end; no output."""
    outputs = {value.name for value in model.graph.output}
    found = [name for name in block_ends(model) if name not in outputs]
    if len(found) <= count:
        return found
    return [found[round(place)] for place in np.linspace(0, len(found) - 1, count + 1)[1:]]

"""A teacher that is another model: its graph with the student's names for inputs and outputs, and no other name in
common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import ConfigError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.worker import Progress

if TYPE_CHECKING:
    import onnx

_PREFIX = "teacher/"


@dataclass(frozen=True, kw_only=True)
class MatchRequest:
    """Write the teacher ``graph`` to ``made`` with the names of ``inputs`` and ``outputs``, which are the student's.

    Attributes:
        where: of the teacher, for messages.
    """

    graph: str
    made: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    where: str


@dataclass(frozen=True, kw_only=True)
class MatchAnswer:
    """Nothing to say: the file is written."""


def match(request: MatchRequest, progress: Progress) -> MatchAnswer:
    """A task of the worker.

    Raises:
        ConfigError: an input or output of the student has no counterpart.
    """
    from kedge_targets.graph import model_reader, model_writer

    made = matched(
        model_reader.load(Path(request.graph)), inputs=request.inputs, outputs=request.outputs, where=request.where
    )
    model_writer.save(model_reader.infer_shapes(made, where=request.where), Path(request.made))
    return MatchAnswer()


def matched(
    teacher: onnx.ModelProto, *, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], where: str
) -> onnx.ModelProto:
    """Return the teacher with the student's inputs and outputs, in the student's order.

    They are paired by name, or, where the names differ, by place. Outputs that the student lacks are left out.

    Raises:
        ConfigError: an input or output of the student has no counterpart of its dtype and shape, or the teacher takes
            an input that the student lacks.
    """
    import onnx
    from onnx import compose, helper

    from kedge_targets.graph import signature

    taken = _pairs(inputs, signature.inputs(teacher), kind="input", where=where)
    given = _pairs(outputs, signature.outputs(teacher), kind="output", where=where)
    constants = {tensor.name for tensor in teacher.graph.initializer}
    made = compose.add_prefix(teacher, _PREFIX)
    held = {value.name: value for value in (*made.graph.input, *made.graph.output)}
    extra = [value for value in made.graph.input if value.name.removeprefix(_PREFIX) in constants]
    body = list(made.graph.node)
    for field in ("input", "output", "node"):
        made.graph.ClearField(field)

    def renamed(value: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
        copy = onnx.ValueInfoProto()
        copy.CopyFrom(value)
        copy.name = name
        return copy

    made.graph.input.extend([renamed(held[_PREFIX + theirs], ours) for ours, theirs in taken.items()] + extra)
    made.graph.output.extend(renamed(held[_PREFIX + theirs], ours) for ours, theirs in given.items())
    made.graph.node.extend(
        helper.make_node("Identity", [ours], [_PREFIX + theirs], name=f"{_PREFIX}input {ours}")
        for ours, theirs in taken.items()
    )
    made.graph.node.extend(body)
    made.graph.node.extend(
        helper.make_node("Identity", [_PREFIX + theirs], [ours], name=f"{_PREFIX}output {ours}")
        for ours, theirs in given.items()
    )
    return made


def _pairs(ours: Sequence[TensorInfo], theirs: Sequence[TensorInfo], *, kind: str, where: str) -> dict[str, str]:
    """Return the teacher's name for each of the student's."""
    known = {one.name: one for one in theirs}
    if all(one.name in known for one in ours):
        found = {one.name: known[one.name] for one in ours}
    elif len(ours) == len(theirs):
        found = {one.name: other for one, other in zip(ours, theirs, strict=True)}
    else:
        missing = next(one.name for one in ours if one.name not in known)
        raise ConfigError(
            f"has no {kind} {missing!r} and another number of {kind}s than the student",
            where=where,
            remedy=f"Its {kind}s are {', '.join(known)}; export both models with the same",
        )
    if kind == "input" and len(found) < len(theirs):
        more = next(name for name in known if name not in {one.name for one in found.values()})
        raise ConfigError(
            f"takes an input {more!r} that the student lacks", where=where, remedy="Export both with the same inputs"
        )
    for one in ours:
        other = found[one.name]
        if other.dtype != one.dtype or not _fits(other.shape, one.shape):
            raise ConfigError(
                f"its {kind} {other.name!r} is {_said(other)}, the student's {one.name!r} is {_said(one)}",
                where=where,
                remedy="A teacher takes what the student takes and answers in the same form; export them so",
            )
    return {name: other.name for name, other in found.items()}


def _fits(left: tuple[int | None, ...], right: tuple[int | None, ...]) -> bool:
    return len(left) == len(right) and all(a == b or a is None or b is None for a, b in zip(left, right, strict=True))


def _said(tensor: TensorInfo) -> str:
    return f"{tensor.dtype} [{', '.join('?' if axis is None else str(axis) for axis in tensor.shape)}]"

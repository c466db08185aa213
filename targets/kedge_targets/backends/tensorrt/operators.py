"""Determines which TensorRT versions take a graph, from NVIDIA's own tables (``operators.toml``)."""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol import codec, toml
from kedge_protocol.errors import LoweringError, TargetError, UnsupportedOperatorError
from kedge_targets.backends.tensorrt.recipe import numbers
from kedge_targets.graph import nodes, opsets

if TYPE_CHECKING:
    import onnx

_PATH = Path(__file__).parent / "operators.toml"
_STANDARD = ("", nodes.DEFAULT_DOMAIN)


@dataclass(frozen=True)
class Table:
    """The tables of opsets and operators.

    Attributes:
        lowest_opset: highest opset that every version takes.
        opsets: version → the highest opset that it and later versions take.
        operators: version → the operators that it introduced.
        undated: operators of the latest table whose first version is not documented.
        costly: operator → what is known about it.
    """

    lowest_opset: int
    opsets: dict[str, int]
    operators: dict[str, tuple[str, ...]]
    undated: tuple[str, ...]
    costly: dict[str, str]

    def since(self, operator: str) -> str | None:
        """Return the first version that has an operator, or None if none has."""
        return next((version for version, names in self.operators.items() if operator in names), None)

    def since_opset(self, opset: int) -> str | None:
        """Return the first version that takes an opset."""
        return next((version for version, highest in self.opsets.items() if opset <= highest), None)

    def highest_opset(self, version: str) -> int:
        """Return the highest opset that a version of TensorRT takes."""
        return max(
            (highest for first, highest in self.opsets.items() if numbers(first) <= numbers(version)),
            default=self.lowest_opset,
        )


@functools.cache
def table() -> Table:
    """Return the tables, from the oldest version to the newest."""
    return codec.structure(toml.read(_PATH, TargetError), Table, where=_PATH.name, strict=True)


@dataclass(frozen=True)
class Fit:
    """What the tables say about a graph.

    Attributes:
        first: the oldest version that takes the graph.
        notes: what is known about its operators.
    """

    first: str
    notes: tuple[str, ...]


def fit(model: onnx.ModelProto, version: str, *, where: str) -> Fit:
    """Check a graph against the tables for a target's TensorRT.

    Args:
        version: the oldest version that the target's devices have.
        where: location for messages.

    Raises:
        UnsupportedOperatorError: no TensorRT has an operator, or this version does not; names the operator and its
            node.
        LoweringError: the opset is too new for this version.
    """
    known = table()
    opset = opsets.version(model)
    needed = known.since_opset(opset)
    if needed is None or numbers(needed) > numbers(version):
        raise LoweringError(
            f"opset {opset} needs TensorRT {needed or 'newer than is known here'}, the target has {version}",
            where=where,
            remedy=f"Export the model with opset {known.highest_opset(version)} or lower",
        )
    first = needed
    found: dict[str, list[str]] = defaultdict(list)
    for graph in nodes.graphs(model.graph):
        for node in graph.node:
            place = f"{where}: node {node.name or '/'.join(node.output)!r}"
            if node.domain not in _STANDARD:
                raise _unsupported(f"{node.domain}.{node.op_type}", "no TensorRT has it", place)
            found[node.op_type].append(node.name)
            if node.op_type in known.undated:
                continue
            since = known.since(node.op_type)
            if since is None:
                raise _unsupported(node.op_type, "no TensorRT has it", place)
            if numbers(since) > numbers(version):
                raise _unsupported(node.op_type, f"it came with TensorRT {since}, the target has {version}", place)
            first = max(first, since, key=numbers)
    return Fit(first, tuple(_notes(known, found)))


def _notes(known: Table, found: dict[str, list[str]]) -> list[str]:
    notes = [f"{_counted(name, found[name])}: {known.costly[name]}" for name in sorted(found) if name in known.costly]
    notes += [
        f"{_counted(name, found[name])}: NVIDIA does not say since which TensorRT it is there"
        for name in sorted(found)
        if name in known.undated
    ]
    return notes


def _counted(operator: str, names: list[str]) -> str:
    return f"{operator} ({names[0]})" if len(names) == 1 else f"{operator} ({len(names)} nodes, first {names[0]})"


def _unsupported(operator: str, why: str, where: str) -> UnsupportedOperatorError:
    return UnsupportedOperatorError(
        f"TensorRT's parser does not take operator {operator}: {why}",
        where=where,
        remedy="Export the model with another operator in its place, or choose a target with another backend",
    )

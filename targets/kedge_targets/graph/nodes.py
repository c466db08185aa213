"""Nodes and operators of a graph as plain data, with names that are stable between readings."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kedge_protocol.errors import MissingDependencyError, UnsupportedOperatorError
from kedge_targets.graph import library, qonnx_nodes

if TYPE_CHECKING:
    import onnx

DEFAULT_DOMAIN = "ai.onnx"
"""Name of the empty domain (ONNX specification, "Operator sets")."""


@dataclass(frozen=True, kw_only=True)
class NodeInfo:
    """One node of the main graph.

    Attributes:
        name: unique in the graph, see :func:`name_nodes`.
        operator, domain: ``Conv`` of ``ai.onnx``.
        inputs, outputs: tensor names; an empty string is an optional input left out.
    """

    name: str
    operator: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def name_nodes(model: onnx.ModelProto) -> None:
    """Give each node of the main graph a unique name, in place.

    A plan names layers by node name, so each must have one, and the same whenever the file is read: an empty name
    becomes ``Operator_INDEX``, the second of two equal names gets ``_2``.
    """
    given = {node.name for node in model.graph.node if node.name}
    used: set[str] = set()
    for index, node in enumerate(model.graph.node):
        base = node.name or f"{node.op_type}_{index}"
        name, count = base, 1
        while name in used or (name in given and name != node.name):
            count += 1
            name = f"{base}_{count}"
        used.add(name)
        node.name = name


def nodes(model: onnx.ModelProto) -> list[NodeInfo]:
    """Return the nodes of the main graph."""
    return [
        NodeInfo(
            name=node.name,
            operator=node.op_type,
            domain=node.domain or DEFAULT_DOMAIN,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
        )
        for node in model.graph.node
    ]


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and every nested graph (branches of If, bodies of Loop and Scan)."""
    yield graph
    for node in graph.node:
        for inner in bodies(node):
            yield from graphs(inner)


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """Return the graphs that a node holds, without those within them."""
    single = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return [*single, *(inner for attribute in node.attribute for inner in attribute.graphs)]


def operators(model: onnx.ModelProto) -> frozenset[tuple[str, str]]:
    """Return ``(domain, operator)`` of every node, including nested graphs and local functions."""
    found = {(node.domain, node.op_type) for graph in graphs(model.graph) for node in graph.node}
    found |= {(node.domain, node.op_type) for function in model.functions for node in function.node}
    return frozenset((domain or DEFAULT_DOMAIN, operator) for domain, operator in found)


def check_operators(model: onnx.ModelProto, *, where: str) -> None:
    """Check that each operator is in a known opset: ONNX's, ONNX Runtime's own, or QONNX's.

    Raises:
        UnsupportedOperatorError: names the operator, its domain and its node.
    """
    versions = {opset.domain or DEFAULT_DOMAIN: opset.version for opset in model.opset_import}
    known = _contributed() | {(function.domain, function.name) for function in model.functions}
    for graph in graphs(model.graph):
        for node in graph.node:
            domain = node.domain or DEFAULT_DOMAIN
            if (node.domain, node.op_type) in known or qonnx_nodes.is_ours(node):
                continue
            if _is_standard(node.op_type, domain, versions.get(domain)):
                continue
            raise UnsupportedOperatorError(
                f"operator {node.op_type!r} of domain {domain!r} is in no opset known here "
                f"(the model imports version {versions.get(domain, 'none')})",
                where=f"{where}: node {node.name or '/'.join(node.output)!r}",
                remedy="Export the model with standard ONNX operators, or replace this node",
            )


def _is_standard(operator: str, domain: str, version: int | None) -> bool:
    import onnx

    if version is None:
        return False
    short = "" if domain == DEFAULT_DOMAIN else domain
    return bool(onnx.defs.has(operator, max_inclusive_version=version, domain=short))


def _contributed() -> frozenset[tuple[str, str]]:
    """Return ONNX Runtime's non-standard operators; none if it is not installed."""
    try:
        library.load()
    except MissingDependencyError:
        return frozenset()
    return _schemas()


@functools.cache
def _schemas() -> frozenset[tuple[str, str]]:
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    return frozenset((schema.domain, schema.name) for schema in get_all_operator_schema() if schema.domain)

"""Checks graphs on the host with NVIDIA's own parser and builder, in the toolchain's driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol.errors import KedgeError, LoweringError, UnsupportedOperatorError
from kedge_targets.backends.tensorrt.recipe import InputProfile
from kedge_targets.toolchain.client import ToolchainClient

NAME = "tensorrt"

CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""GPUs to build for, as the vendor names them: Ampere, Ada, Blackwell. The ahead-of-time builder does not know Orin
(SM87); SM86 is the nearest."""

_START_SECONDS = 120.0
_BUILD_SECONDS = 1800.0


@dataclass(frozen=True, kw_only=True)
class CheckRequest:
    """See the task ``parse_and_build`` in ``toolchain/driver.py``."""

    graph: str
    capabilities: tuple[str, ...]
    workspace_bytes: int
    profiles: tuple[InputProfile, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """One error of the parser or builder.

    Attributes:
        node, operator: those of the graph; empty if the vendor does not name them.
        code: the parser's code (``UNSUPPORTED_NODE``), or ``BUILD``.
        what: the vendor's message.
    """

    node: str
    operator: str
    code: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of the parser and the builder.

    Attributes:
        accepted: whether it was parsed, and built for every capability.
        layers: number of layers in TensorRT's network.
        engine_bytes: size of the engine that was built and discarded.
    """

    accepted: bool
    errors: tuple[Refusal, ...]
    layers: int
    engine_bytes: int
    seconds: float
    warnings: tuple[str, ...] = field(default=())


_client = ToolchainClient(NAME, start_seconds=_START_SECONDS)


def check(
    graph: Path,
    *,
    workspace_bytes: int,
    profiles: tuple[InputProfile, ...] = (),
    capabilities: tuple[str, ...] = CAPABILITIES,
) -> Checked:
    """Let NVIDIA's parser and builder try a graph.

    Raises:
        ToolchainError: the toolchain is not installed.
        LoweringError: the parser or the builder crashed, or ran out of time or memory.
    """
    request = CheckRequest(
        graph=str(graph), capabilities=capabilities, workspace_bytes=workspace_bytes, profiles=profiles
    )
    return _client.call("parse_and_build", request, Checked, deadline=_BUILD_SECONDS, where=graph.name)


def require(found: Checked, *, where: str) -> None:
    """Raise the error for the first refusal, naming the node, unless the graph was accepted.

    Raises:
        UnsupportedOperatorError: TensorRT has no such operator, or not with these types or attributes.
        LoweringError: anything else.
    """
    if found.accepted:
        return
    refusal = found.errors[0]
    place = f"{where}: node {refusal.node!r}" if refusal.node else where
    operator = f" operator {refusal.operator}" if refusal.operator else " the graph"
    more = f" (and {len(found.errors) - 1} more)" if len(found.errors) > 1 else ""
    kind: type[KedgeError] = UnsupportedOperatorError if refusal.code.startswith("UNSUPPORTED_NODE") else LoweringError
    raise kind(
        f"TensorRT refuses{operator}: {refusal.what}{more}",
        where=place,
        remedy="Export the model with another operator in its place, or choose a target with another backend",
    )


def versions() -> dict[str, str]:
    """Return the packages that perform the check, and their versions."""
    return _client.versions()

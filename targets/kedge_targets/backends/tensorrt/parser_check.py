"""The host's check: NVIDIA's own parser and builder, in the toolchain's driver."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol.errors import KedgeError, LoweringError, UnsupportedOperatorError
from kedge_targets.backends.tensorrt.recipe import InputProfile
from kedge_targets.toolchain.client import ToolchainClient

NAME = "tensorrt"

CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""GPUs that are built for, as the vendor names them: Ampere, Ada, Blackwell. Orin (SM87) is not among those that the
ahead-of-time builder knows; SM86 is the nearest."""

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
    """One error.

    Attributes:
        node, operator: of the graph; empty where the vendor does not tell.
        code: the parser's (``UNSUPPORTED_NODE``), or ``BUILD``.
        what: the vendor's words.
    """

    node: str
    operator: str
    code: str
    what: str


@dataclass(frozen=True, kw_only=True)
class Checked:
    """What the parser and the builder said.

    Attributes:
        accepted: parsed, and built for every capability.
        layers: of TensorRT's network.
        engine_bytes: of the engine that was built and thrown away.
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
        ToolchainError: it is not installed.
        LoweringError: the parser or the builder crashed, or ran out of time or memory.
    """
    request = CheckRequest(
        graph=str(graph), capabilities=capabilities, workspace_bytes=workspace_bytes, profiles=profiles
    )
    return _client.call("parse_and_build", request, Checked, deadline=_BUILD_SECONDS, where=graph.name)


def require(found: Checked, *, where: str) -> None:
    """Raises what the first refusal means, naming the node, unless the graph was accepted.

    Raises:
        UnsupportedOperatorError: TensorRT has no such operator, or not with these types or attributes.
        LoweringError: all else.
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
    """The packages that checked, and their versions."""
    return _client.versions()

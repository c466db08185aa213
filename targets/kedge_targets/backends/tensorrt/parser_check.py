"""The host's check: NVIDIA's own parser and builder, in the toolchain's driver."""

from __future__ import annotations

import atexit
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol.errors import KedgeError, LoweringError, UnsupportedOperatorError, WorkerError
from kedge_targets import toolchain
from kedge_targets.backends.tensorrt.recipe import InputProfile
from kedge_targets.toolchain.installation import Versions
from kedge_targets.worker import Worker

NAME = "tensorrt"

CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")
"""GPUs that are built for, as the vendor names them: Ampere, Ada, Blackwell. Orin (SM87) is not among those that the
ahead-of-time builder knows; SM86 is the nearest."""

_START_SECONDS = 120.0
_BUILD_SECONDS = 1800.0
_MEMORY_SHARE = 0.8  # of the machine's


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


_lock = threading.Lock()
_kept: dict[Path, tuple[Worker, Versions]] = {}


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
    worker, _ = _driver()
    request = CheckRequest(
        graph=str(graph), capabilities=capabilities, workspace_bytes=workspace_bytes, profiles=profiles
    )
    try:
        return worker.call("parse_and_build", request, Checked, deadline=_BUILD_SECONDS)
    except WorkerError as error:
        raise LoweringError(error.what, where=graph.name, remedy=error.remedy) from error


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
    return dict(_driver()[1].packages)


def _driver() -> tuple[Worker, Versions]:
    """The running driver; the library is 230 MB to load."""
    installed = toolchain.find(NAME)
    with _lock:
        if installed.folder not in _kept:
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            worker = installed.worker(memory_limit=int(memory * _MEMORY_SHARE))
            atexit.register(worker.close)
            try:
                found = worker.call("version", {}, Versions, deadline=_START_SECONDS)
            except WorkerError as error:
                raise LoweringError(error.what, where=error.where, remedy=error.remedy) from error
            _kept[installed.folder] = (worker, found)
        return _kept[installed.folder]

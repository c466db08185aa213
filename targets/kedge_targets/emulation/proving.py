"""Runs a bundle's golden vectors and further samples by the runtimes for 64-bit ARM, under qemu-user.

Kernels for x86 prove nothing about ARM's. What runs here is what runs on the device: the same wheels, the same proof
(:mod:`kedge_targets.proof`), a processor with the target's instructions. Its time says nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import kedge_protocol
import kedge_targets
from kedge_protocol.errors import ToolchainError
from kedge_targets.target import Target
from kedge_targets.toolchain import declaration, foreign_system, store
from kedge_targets.toolchain.client import lowering_errors

_DOT_PRODUCTS = "asimddp"
_SECONDS = 900.0
_SAMPLES_SECONDS = 120.0


@dataclass(frozen=True, kw_only=True)
class EmulationRequest:
    """See the task ``prove`` in ``toolchain/driver.py``."""

    folder: str
    config: str
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    seconds: float = _SAMPLES_SECONDS
    paths: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EmulationAnswer:
    """The result of a proof on an emulated processor.

    Attributes:
        holds, reason: as in :class:`kedge_targets.proof.ProveAnswer`.
        vectors: golden vectors run.
        runtime, runtime_version: the distribution that ran them.
        machine: the processor's architecture, as the emulated process sees it.
        samples: further samples run; their outputs are saved.
    """

    holds: bool
    reason: str
    vectors: int
    runtime: str
    runtime_version: str
    machine: str
    samples: int


def processor_of(target: Target) -> str | None:
    """Return qemu's name of a processor that has a target's instructions and few others; None if none of that kind can
    be emulated, or if this machine is of that kind."""
    processor = target.processor
    if processor.architecture != declaration.EMULATED or platform.machine() == processor.architecture:
        return None
    if _DOT_PRODUCTS in processor.instruction_sets:
        return "cortex-a76"
    return "cortex-a72" if processor.cores > 1 else "cortex-a53"


def runs(distributions: Iterable[str]) -> bool:
    """Return whether the emulated system has any of these runtimes."""
    return bool(set(distributions) & set(declaration.read(declaration.EMULATED).distributions))


def installed() -> bool:
    """Return whether the emulated system is there."""
    try:
        store.find(declaration.EMULATED)
    except ToolchainError:
        return False
    return True


def prove(cpu: str, request: EmulationRequest) -> EmulationAnswer:
    """Run a bundle's vectors and samples.

    Args:
        cpu: of :func:`processor_of`.

    Raises:
        ToolchainError: the emulated system is not installed.
        LoweringError: the emulated process crashed, or ran out of time.
        KedgeError: the runtime refuses the file.
    """
    toolchain = store.find(declaration.EMULATED)
    folders = [str(Path(str(package.__file__)).parent.parent) for package in (kedge_targets, kedge_protocol)]
    asked = replace(request, paths=folders)
    with lowering_errors(f"an emulated {cpu}"), toolchain.worker(env={foreign_system.CPU_VARIABLE: cpu}) as worker:
        return worker.call("prove", asked, EmulationAnswer, deadline=_SECONDS)

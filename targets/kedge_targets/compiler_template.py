"""The common part of all backend compilers: reports missing tools, refuses unknown options, explains vendor
failures."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge_protocol.errors import KedgeError, LoweringError, MissingDependencyError, TargetError
from kedge_protocol.packages import pip_install
from kedge_protocol.spelling import known_names
from kedge_targets import contract, toolchain
from kedge_targets.contract import Calibration, Lowered
from kedge_targets.graph import library
from kedge_targets.numerics import Plan
from kedge_targets.target import Target


@dataclass(frozen=True, kw_only=True)
class LoweringJob:
    """The arguments of :meth:`kedge_targets.contract.Compiler.lower`."""

    graph: Path
    plan: Plan
    calibration: Calibration
    target: Target
    options: Mapping[str, Any]
    workdir: Path

    def require_samples(self) -> None:
        """Raise :class:`LoweringError` if there is no calibration sample."""
        if not self.calibration.samples:
            raise LoweringError("there are no calibration samples", remedy="Give at least one; some hundred are usual")


class CompilerTemplate(contract.Compiler):
    """A :class:`kedge_targets.contract.Compiler` whose subclasses implement only the lowering itself."""

    tools: str
    """Name of the lowering tools in errors: ``ONNX Runtime's tools``."""
    modules: tuple[str, ...] = ("onnx",)
    """Modules that must be importable; the ``compile`` extra provides them."""
    toolchain: str | None = None
    """The toolchain that must be installed."""
    known_options: frozenset[str] = frozenset()
    """Options that a target file may set."""

    def missing(self) -> str | None:
        """See :meth:`kedge_targets.contract.Compiler.missing`."""
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        if absent:
            return f"{absent[0]} is missing: {pip_install('compile')}"
        try:
            self.require_tools()
        except MissingDependencyError as error:
            return str(error)
        return None

    def require_tools(self) -> None:
        """Load or find tools that :attr:`modules` does not name.

        Raises:
            MissingDependencyError: it is not installed.
        """
        if self.toolchain is not None:
            toolchain.find(self.toolchain)

    def check(self, job: LoweringJob) -> None:
        """Refuse, before any long work, what this backend cannot do.

        Raises:
            TargetError: an option of the target.
            LoweringError: the plan.
        """

    def reason_of(self, error: Exception) -> str:
        """Return the vendor's message of an error."""
        return library.reason_of(error)

    @abc.abstractmethod
    def lower_job(self, job: LoweringJob) -> Lowered:
        """:meth:`lower`, after all checks; errors of the vendor's packages may leave it as they are."""

    def lower(
        self,
        graph: Path,
        plan: Plan,
        calibration: Calibration,
        *,
        target: Target,
        options: Mapping[str, Any],
        workdir: Path,
    ) -> Lowered:
        """See :meth:`kedge_targets.contract.Compiler.lower`."""
        if unknown := sorted(set(options) - self.known_options):
            raise TargetError(
                f"unknown option {unknown[0]!r}",
                where=f"target {target.name}, options",
                remedy=known_names(unknown[0], sorted(self.known_options)),
            )
        job = LoweringJob(
            graph=graph, plan=plan, calibration=calibration, target=target, options=options, workdir=workdir
        )
        self.check(job)
        if self.toolchain is not None:
            toolchain.find(self.toolchain)
        try:
            return self.lower_job(job)
        except KedgeError:
            raise
        except Exception as error:  # what the vendors' packages raise has no common base
            raise LoweringError(
                f"{self.tools} failed: {type(error).__name__}: {self.reason_of(error)}", where=graph.name
            ) from error

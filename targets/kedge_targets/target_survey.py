"""Surveys the targets: their backends, how far this host can verify bundles, and what is missing for it."""

from __future__ import annotations

from dataclasses import dataclass

from kedge_protocol.bundle.config import Verified
from kedge_targets import firmware, registry
from kedge_targets import target as targets
from kedge_targets.target import Target


@dataclass(frozen=True, kw_only=True)
class BackendView:
    """One backend of a target.

    Attributes:
        precisions: that it can lower a whole model to.
        verification: how far bundles for this target can be proved on this host once nothing is missing.
        missing: what must be installed first, with the command; None where nothing is.
    """

    name: str
    precisions: tuple[str, ...]
    verification: Verified
    missing: str | None = None

    @property
    def here(self) -> Verified | None:
        """How far bundles can be verified here; None if something is missing."""
        return self.verification if self.missing is None else None


@dataclass(frozen=True, kw_only=True)
class TargetView:
    """One target.

    Attributes:
        backends: in order of preference.
        firmware: the folders that make its board ready, below ``firmware-configs``.
    """

    name: str
    title: str
    architecture: str
    backends: tuple[BackendView, ...]
    firmware: tuple[str, ...] = ()


def survey() -> tuple[TargetView, ...]:
    """Return all of Kedge's own targets, by name.

    Raises:
        TargetError: a target's file is broken, or names a backend that there is not.
    """
    base, kits = firmware.folder(), firmware.kits()
    found = []
    for name in targets.names():
        target = targets.find(name)
        found.append(
            TargetView(
                name=name,
                title=target.title,
                architecture=target.processor.architecture,
                backends=tuple(_backend(choice.name, target) for choice in target.backends),
                firmware=tuple(str(folder.relative_to(base)) for folder in kits.get(name, ())),
            )
        )
    return tuple(found)


def _backend(name: str, target: Target) -> BackendView:
    compiler = registry.compiler(name)
    return BackendView(
        name=name,
        precisions=tuple(precision.value for precision in compiler.numerics.precisions),
        verification=compiler.verification(target),
        missing=compiler.missing(),
    )

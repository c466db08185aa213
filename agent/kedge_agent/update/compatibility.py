"""Checks whether this device can run a bundle before its files are pulled."""

from __future__ import annotations

import re
from collections.abc import Mapping

from kedge_agent.update.events import Measured
from kedge_protocol.bundle.config import BundleConfig, RuntimeRequirement
from kedge_protocol.errors import IncompatibleError

_RELEASE = re.compile(r"\d+(?:\.\d+)*")


def release_of(version: str) -> tuple[int, ...]:
    """Return the release part of a version (PEP 440) as numbers without trailing zeros: ``2.14.0rc1`` → (2, 14)."""
    found = _RELEASE.match(version.strip().lstrip("vV"))
    numbers = [int(part) for part in found.group().split(".")] if found else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def in_range(version: str, requirement: RuntimeRequirement) -> bool:
    """Return whether an installed version meets a requirement: ``minimum`` is inclusive, ``below`` exclusive."""
    installed = release_of(version)
    if installed < release_of(requirement.minimum):
        return False
    return requirement.below is None or installed < release_of(requirement.below)


def require_target(config: BundleConfig, model: str, target: str) -> None:
    """Raise :class:`IncompatibleError` unless the bundle is of this model and for this target."""
    if config.name != model:
        raise IncompatibleError(f"the bundle holds model {config.name!r}, not {model!r}")
    if config.target != target:
        raise IncompatibleError(
            f"the bundle is for target {config.target!r}, this device is {target!r}",
            remedy="Compile for this target, or correct [device] target in agent.toml",
        )


def require_runtime(config: BundleConfig, measured: Measured) -> None:
    """Raise :class:`IncompatibleError` unless one of the bundle's runtimes is installed in its version range and the
    device has enough memory."""
    require_distribution(config, measured.runtimes)
    if config.resources.memory_bytes > measured.memory_bytes:
        raise IncompatibleError(
            f"the bundle needs {_mib(config.resources.memory_bytes)} of memory, the device has "
            f"{_mib(measured.memory_bytes)}"
        )


def require_distribution(config: BundleConfig, installed: Mapping[str, str]) -> None:
    """Raise :class:`IncompatibleError` unless one of the bundle's runtimes is among the installed ones (distribution →
    version), in its version range."""
    if any(need.distribution in installed and in_range(installed[need.distribution], need) for need in config.runtimes):
        return
    wanted = " or ".join(_words(need) for need in config.runtimes) or "none that is named"
    there = ", ".join(f"{name} {version}" for name, version in sorted(installed.items())) or "none of them"
    raise IncompatibleError(
        f"the bundle needs {wanted}; installed is {there}", remedy="Install the runtime and roll out again"
    )


def require_room(measured: Measured, reserve: int) -> None:
    """Raise :class:`IncompatibleError` unless the files fit on the disk with ``reserve`` bytes left."""
    if measured.missing_bytes and measured.missing_bytes + reserve > measured.free_bytes:
        raise IncompatibleError(
            f"the bundle needs {_mib(measured.missing_bytes)} of disk and {_mib(reserve)} must stay free, "
            f"there are {_mib(measured.free_bytes)}",
            remedy="Free space on the device and roll out again",
        )


def _words(need: RuntimeRequirement) -> str:
    below = f", <{need.below}" if need.below else ""
    return f"{need.distribution} >={need.minimum}{below}"


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.1f} MiB"

"""The environments on disk: where they lie, which there are, taking them away."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol import files
from kedge_protocol.errors import StorageError, ToolchainError
from kedge_protocol.folders import data_folder
from kedge_protocol.progress import ignore_progress
from kedge_targets.toolchain import declaration
from kedge_targets.toolchain.declaration import Declaration
from kedge_targets.worker import OnProgress, Worker

_STAGING = ".staging-"


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """An installed toolchain.

    Attributes:
        name: the backend's.
        folder: the environment.
        python: its interpreter; the environment's scripts are not used (they hold the path it was built at).
        driver: the program that runs in it.
    """

    name: str
    folder: Path
    python: Path
    driver: Path

    def worker(self, *, memory_limit: int | None = None) -> Worker:
        """A worker that runs the driver."""
        return Worker(name=self.name, python=self.python, driver=self.driver, memory_limit=memory_limit)


@dataclass(frozen=True, kw_only=True)
class ToolchainState:
    """A declared toolchain and whether it is installed.

    Attributes:
        folder: the environment of the current lock; None where it is not installed.
        outdated: environments of other locks.
    """

    name: str
    description: str
    disk_bytes: int
    folder: Path | None
    outdated: tuple[Path, ...]

    @property
    def installed(self) -> bool:
        """Whether the current lock's environment is there."""
        return self.folder is not None


def toolchains_folder() -> Path:
    """Where all environments lie; made if it is missing.

    Raises:
        StorageError: it cannot be made.
    """
    folder = data_folder() / "toolchains"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    return folder


def environment_of(declared: Declaration, python: str) -> Path:
    """Where the environment of the current lock lies, for one Python version."""
    return data_folder() / "toolchains" / f"{declared.name}-{declared.key(python)}"


def toolchain_in(declared: Declaration, folder: Path) -> Toolchain:
    """The toolchain of an environment that is there."""
    return Toolchain(
        name=declared.name, folder=folder, python=folder / "bin" / "python", driver=declared.driver.resolve()
    )


def installed(declared: Declaration) -> Path | None:
    """The environment of the current lock, or None. What is there is whole: it is put in place by one rename."""
    found = (environment_of(declared, python) for python in declared.python)
    return next((folder for folder in found if (folder / "bin" / "python").exists()), None)


def find(name: str) -> Toolchain:
    """An installed toolchain.

    Raises:
        ToolchainError: unknown, or not installed; the remedy is the command that installs it.
    """
    declared = declaration.read(name)
    folder = installed(declared)
    if folder is None:
        raise ToolchainError(f"the toolchain {name!r} is not installed", remedy=f"Run: kedge toolchain install {name}")
    return toolchain_in(declared, folder)


def list_toolchains() -> list[ToolchainState]:
    """Every declared toolchain, sorted by name."""
    states = []
    for name in declaration.names():
        declared = declaration.read(name)
        folder = installed(declared)
        states.append(
            ToolchainState(
                name=name,
                description=declared.description,
                disk_bytes=declared.disk_bytes,
                folder=folder,
                outdated=tuple(path for path in environments(name) if path != folder),
            )
        )
    return states


def environments(name: str) -> list[Path]:
    """All environments of a toolchain, of whatever lock."""
    digits = "[0-9a-f]" * 16
    return sorted((data_folder() / "toolchains").glob(f"{name}-{digits}"))


def remove(name: str) -> list[Path]:
    """Take away every environment of a toolchain; returns those there were.

    Raises:
        ToolchainError: unknown toolchain.
        StorageError: an environment cannot be removed.
    """
    declaration.read(name)
    removed = environments(name)
    with locked(name):
        for folder in removed:
            # Out of sight by one rename, so that nobody finds half of it.
            doomed = staging(name)
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:
                raise StorageError(f"cannot be removed: {error.strerror}", where=str(folder)) from error
    return removed


def staging(name: str) -> Path:
    """A new path beside the environments, for what is being built or taken away; call it under :func:`locked`."""
    return toolchains_folder() / f"{_STAGING}{name}-{secrets.token_hex(4)}"


def clear_staging(name: str) -> None:
    """Remove what a killed installation or removal left; call it under :func:`locked`: then nobody works there."""
    for stale in toolchains_folder().glob(f"{_STAGING}{name}-*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def locked(name: str, on_progress: OnProgress = ignore_progress) -> Iterator[int]:
    """Only one at a time; others wait. The lock ends with its process, however that ends, and with the processes that
    were given its descriptor, which is yielded: what a killed installation left running must end first."""
    path = toolchains_folder() / f".{name}.lock"
    with files.locked(path, on_wait=lambda: on_progress("waiting for another installation", 0, 0)) as handle:
        yield handle

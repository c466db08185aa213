"""Manages the environments on disk: finds, lists and removes them."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
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
        name: the backend's name.
        folder: the environment.
        python: its interpreter; the environment's scripts are not used (they contain the path where it was built).
        driver: the program that runs in it.
    """

    name: str
    folder: Path
    python: Path
    driver: Path

    def worker(self, *, memory_limit: int | None = None, env: Mapping[str, str] | None = None) -> Worker:
        """Return a worker that runs the driver, with further variables in its environment."""
        return Worker(name=self.name, python=self.python, driver=self.driver, memory_limit=memory_limit, env=env)


@dataclass(frozen=True, kw_only=True)
class ToolchainState:
    """A declared toolchain and whether it is installed.

    Attributes:
        folder: the environment of the current lock; None if it is not installed.
        outdated: environments of other locks.
    """

    name: str
    description: str
    disk_bytes: int
    folder: Path | None
    outdated: tuple[Path, ...]

    @property
    def installed(self) -> bool:
        """Whether the current lock's environment is installed."""
        return self.folder is not None


def toolchains_folder() -> Path:
    """Return the folder of all environments, and create it if it is missing.

    Raises:
        StorageError: it cannot be created.
    """
    folder = data_folder() / "toolchains"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    return folder


def environment_of(declared: Declaration, python: str) -> Path:
    """Return the place of the current lock's environment for one Python version."""
    return data_folder() / "toolchains" / f"{declared.name}-{declared.key(python)}"


def toolchain_in(declared: Declaration, folder: Path) -> Toolchain:
    """Return the toolchain of an existing environment."""
    return Toolchain(
        name=declared.name, folder=folder, python=folder / "bin" / "python", driver=declared.driver.resolve()
    )


def installed(declared: Declaration) -> Path | None:
    """Return the current lock's environment, or None. An existing one is complete, because it is put in place by one
    rename."""
    found = (environment_of(declared, python) for python in declared.python)
    return next((folder for folder in found if (folder / "bin" / "python").exists()), None)


def find(name: str) -> Toolchain:
    """Return an installed toolchain.

    Raises:
        ToolchainError: it is unknown or not installed; the remedy is the command that installs it.
    """
    declared = declaration.read(name)
    folder = installed(declared)
    if folder is None:
        raise ToolchainError(f"the toolchain {name!r} is not installed", remedy=f"Run: kedge toolchain install {name}")
    return toolchain_in(declared, folder)


def list_toolchains() -> list[ToolchainState]:
    """Return all declared toolchains, sorted by name."""
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
    """Return all environments of a toolchain, for any lock."""
    digits = "[0-9a-f]" * 16
    return sorted((data_folder() / "toolchains").glob(f"{name}-{digits}"))


def remove(name: str) -> list[Path]:
    """Remove all environments of a toolchain and return them.

    Raises:
        ToolchainError: the toolchain is unknown.
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
    """Return a new path beside the environments for one that is being built or removed; call this under
    :func:`locked`."""
    return toolchains_folder() / f"{_STAGING}{name}-{secrets.token_hex(4)}"


def clear_staging(name: str) -> None:
    """Remove the remains of a killed installation or removal; call this under :func:`locked`, so that nobody works
    there."""
    for stale in toolchains_folder().glob(f"{_STAGING}{name}-*"):
        shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def locked(name: str, on_progress: OnProgress = ignore_progress) -> Iterator[int]:
    """Allow only one installation or removal at a time; others wait. The lock ends with its process, however that ends,
    and with the processes that inherited its descriptor, which is yielded: leftovers of a killed installation must end
    first."""
    path = toolchains_folder() / f".{name}.lock"
    with files.locked(path, on_wait=lambda: on_progress("waiting for another installation", 0, 0)) as handle:
        yield handle

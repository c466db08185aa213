"""Reads a backend's declaration of its toolchain."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError, ToolchainError
from kedge_protocol.spelling import known_names

BACKENDS = Path(__file__).resolve().parent.parent / "backends"
EMULATED = "aarch64"
"""Another processor's runtimes, emulated."""
ULTRALYTICS = "ultralytics"
"""Reads checkpoints with Ultralytics' own code."""
_OTHERS = {EMULATED: "emulation", ULTRALYTICS: "ultralytics"}
"""Toolchains that are no backend's → their folders."""
_KEY_DIGITS = 16


@dataclass(frozen=True, kw_only=True)
class _Document:
    description: str
    python: tuple[str, ...]
    disk_bytes: int
    architecture: str = ""
    system: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """The declaration of one toolchain.

    Attributes:
        name: the backend's name, or one of :data:`EMULATED` and :data:`ULTRALYTICS`.
        folder: the folder with ``requirements.txt`` and ``driver.py``.
        description: a description for users.
        python: the Python versions (``3.11``) of the lock, best first.
        disk_bytes: the approximate disk space of the finished environment, in bytes.
        architecture: the processor that is emulated; empty for an environment of this machine's own.
        system: packages of Debian that the emulated processor's system is made of.
    """

    name: str
    folder: Path
    description: str
    python: tuple[str, ...]
    disk_bytes: int
    architecture: str = ""
    system: tuple[str, ...] = ()

    @property
    def lock(self) -> Path:
        """The locked requirements."""
        return self.folder / "requirements.txt"

    @property
    def driver(self) -> Path:
        """The program that runs in the environment."""
        return self.folder / "driver.py"

    @property
    def packages(self) -> int:
        """The number of packages in the lock."""
        return len(self.distributions)

    @property
    def distributions(self) -> tuple[str, ...]:
        """The names of the packages in the lock."""
        text = self.lock.read_text(encoding="utf-8")
        return tuple(re.findall(r"^([A-Za-z0-9][^\s#]*?)==", text, re.MULTILINE))

    def key(self, python: str) -> str:
        """Return the environment's key for one Python version: the first 16 digits of the sha256 of lock, version and
        the system's packages."""
        state = hashlib.sha256(self.lock.read_bytes())
        state.update(f"python {python}".encode())
        state.update("".join(f" {one}" for one in self.system).encode())
        return state.hexdigest()[:_KEY_DIGITS]


def names() -> list[str]:
    """Return the names of all toolchains, sorted."""
    found = [path.parent.parent.name for path in BACKENDS.glob("*/toolchain/toolchain.toml")]
    return sorted([*found, *(name for name in _OTHERS if (_folder(name) / "toolchain.toml").is_file())])


def _folder(name: str) -> Path:
    if name in _OTHERS:
        return BACKENDS.parent / _OTHERS[name] / "toolchain"
    return BACKENDS / name / "toolchain"


def read(name: str) -> Declaration:
    """Read the declaration of a toolchain.

    Raises:
        ToolchainError: there is none of that name, or it is invalid.
    """
    if name not in names():
        raise ToolchainError(f"unknown toolchain {name!r}", remedy=known_names(name, names()))
    folder = _folder(name)
    path = folder / "toolchain.toml"
    try:
        document = codec.structure(toml.read(path, ToolchainError), _Document, where=str(path), strict=True)
    except ConfigError as error:
        raise ToolchainError(f"broken declaration: {error}", where=str(path)) from error
    return Declaration(
        name=name,
        folder=folder,
        description=document.description,
        python=document.python,
        disk_bytes=document.disk_bytes,
        architecture=document.architecture,
        system=document.system,
    )

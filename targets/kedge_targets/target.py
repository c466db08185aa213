"""Targets: one TOML file per kind of device. Kedge's own are in ``devices/``; a user's board is ``./board.toml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError, TargetError
from kedge_protocol.spelling import known_names
from kedge_protocol.topics import checked_name

DEVICES = Path(__file__).parent / "devices"


@dataclass(frozen=True, kw_only=True)
class Processor:
    """The device's processor.

    Attributes:
        architecture: ``x86_64``, ``aarch64`` or ``armv7l``.
        instruction_sets: that every device of this target has (``avx2``, ``avx512_vnni``, ``neon``, …); what is not
            listed is not relied on.
        cores: at least.
    """

    architecture: str
    instruction_sets: tuple[str, ...] = ()
    cores: int = 1


@dataclass(frozen=True, kw_only=True)
class System:
    """The device's system: name and version for people, memory in bytes for decisions."""

    os: str
    memory_bytes: int
    python: str = ">=3.10"


@dataclass(frozen=True, kw_only=True)
class BackendChoice:
    """One backend of a target.

    Attributes:
        options: passed to its compiler and runtime.
        usual: whether it is tried without ``--every-backend``.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    usual: bool = True


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of device.

    Attributes:
        name: as in ``--target``.
        title: for people.
        backends: in order of preference.
        runtimes: distribution → version, as the device's image has it (``3.*`` forms are not used: exact or newer).
    """

    name: str
    title: str
    processor: Processor
    system: System
    backends: tuple[BackendChoice, ...]
    runtimes: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> Target:
    """Read one target file; unknown keys are errors.

    Raises:
        TargetError: missing, not TOML, a key unknown or of the wrong type, no backend.
    """
    data = toml.read(path, TargetError, remedy="See docs/targets.md for the form")
    try:
        target = codec.structure(data, Target, where=str(path), strict=True)
        checked_name(target.name, "target name")
    except ConfigError as error:
        raise TargetError(error.what, where=str(path), remedy="See docs/targets.md for the form") from error
    if not target.backends or not target.backends[0].usual:
        raise TargetError("lists no backend, or first one that is not usual", where=str(path))
    return target


def names() -> list[str]:
    """Return the names of Kedge's own targets, sorted."""
    return sorted(path.stem for path in DEVICES.glob("*.toml"))


def find(name_or_path: str) -> Target:
    """Return a target by name, or by the path of its file (anything ending in ``.toml``).

    Raises:
        TargetError: unknown; the message lists those there are.
    """
    if name_or_path.endswith(".toml"):
        return read(Path(name_or_path))
    path = DEVICES / f"{name_or_path}.toml"
    if name_or_path not in names():
        raise TargetError(
            f"unknown target {name_or_path!r}",
            remedy=f"{known_names(name_or_path, names())}; for a board of your own give the path of its .toml file",
        )
    return read(path)

"""Finds the setup files of a target's board: ``firmware-configs``, at the root of a checkout or in the installed
package.

``kits.toml`` there says which folders belong to which target, laid over each other. In each of them ``root/`` holds
what is installed, by its path; ``packages/`` lists; ``agent.toml`` and ``README.md`` lie beside.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError, StorageError, TargetError

_PLACES = (Path(__file__).parent / "firmware-configs", Path(__file__).resolve().parents[2] / "firmware-configs")
_MAP = "kits.toml"


@dataclass(frozen=True, kw_only=True)
class _Kits:
    targets: dict[str, tuple[str, ...]]


def folder() -> Path:
    """Return the folder ``firmware-configs``.

    Raises:
        StorageError: this Kedge was installed without it.
    """
    found = next((place for place in _PLACES if (place / _MAP).is_file()), None)
    if found is None:
        raise StorageError("the folder firmware-configs is missing", remedy="Install Kedge anew, from its wheel")
    return found


def kits() -> dict[str, tuple[Path, ...]]:
    """Return target → folders with its setup files, lowest first.

    Raises:
        ConfigError: the map is broken, or names a folder that is not there.
    """
    base = folder()
    path = base / _MAP
    named = codec.structure(toml.read(path, ConfigError), _Kits, where=str(path), strict=True).targets
    if absent := sorted({name for names in named.values() for name in names if not (base / name).is_dir()}):
        raise ConfigError(f"names a folder that is not there: {absent[0]}", where=str(path))
    return {target: tuple(base / name for name in names) for target, names in named.items()}


def layers(target: str) -> tuple[Path, ...]:
    """Return the folders of one target, lowest first.

    Raises:
        TargetError: there are none.
    """
    known = kits()
    if target not in known:
        raise TargetError(
            f"there is nothing in firmware-configs for target {target!r}",
            remedy=f"Name one that the board is like: {', '.join(sorted(known))}",
        )
    return known[target]


def files(target: str) -> dict[str, Path]:
    """Path within a kit → file, of one target: what lies below ``root/`` by the path it is installed at, all else as it
    lies; a later folder's file counts. What locks are made from (``pip.in``) stays here.

    Raises:
        TargetError: see :func:`layers`.
    """
    found: dict[str, Path] = {}
    folders = layers(target)
    for layer in folders:
        for path in sorted(layer.rglob("*")):
            inner = path.relative_to(layer)
            # A folder within a folder may be a layer of its own, of this target or of another.
            if (
                path.is_file()
                and path.suffix != ".in"
                and inner.parts[0] in ("root", "packages", "agent.toml", "README.md", "install.sh")
            ):
                parts = inner.parts[1:] if inner.parts[0] == "root" else inner.parts
                found["/".join(parts)] = path
    return found

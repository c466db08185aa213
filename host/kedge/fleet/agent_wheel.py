"""Builds the agent's wheel for a kit from this installation, so that no board needs a package index for it."""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import io
import runpy
import zipfile
from collections.abc import Mapping
from pathlib import Path

import kedge_protocol
from kedge_protocol.errors import MissingDependencyError, StorageError
from kedge_protocol.packages import AGENT

_TREE = Path(kedge_protocol.__file__).resolve().parents[2]
_RULE = _TREE / "agent" / "agent_files.py"
"""In a checkout: lists the files that a device needs."""
_NOT_METADATA = ("RECORD", "INSTALLER", "REQUESTED", "WHEEL", "direct_url.json")
_WHEEL = "Wheel-Version: 1.0\nGenerator: kedge\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@functools.cache
def build() -> tuple[str, bytes]:
    """Return the wheel's file name and content; the same installation gives the same bytes.

    Raises:
        MissingDependencyError: the agent's distribution is not installed, or is of another version than this code.
        StorageError: one of its files cannot be read.
    """
    try:
        installed = importlib.metadata.distribution(AGENT)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    if installed is None or installed.version != kedge_protocol.__version__:
        found = "is not installed" if installed is None else f"is of version {installed.version}"
        raise MissingDependencyError(
            f"{AGENT} {found}: a kit carries its wheel, of version {kedge_protocol.__version__}",
            remedy="Install it as the README says",
        )
    stem = f"{AGENT.replace('-', '_')}-{installed.version}"
    try:
        content = {place: path.read_bytes() for place, path in _code(installed).items()}
        for path in installed.files or ():
            if path.parts[0].endswith(".dist-info") and path.name not in _NOT_METADATA:
                place = Path(f"{stem}.dist-info", *path.parts[1:]).as_posix()
                content[place] = Path(str(path.locate())).read_bytes()
    except OSError as error:
        raise StorageError(f"a file of {AGENT} cannot be read: {error}", remedy="Install Kedge anew") from error
    content[f"{stem}.dist-info/WHEEL"] = _WHEEL.encode()
    return f"{stem}-py3-none-any.whl", _packed(content, record=f"{stem}.dist-info/RECORD")


def _code(installed: importlib.metadata.Distribution) -> dict[str, Path]:
    if _RULE.is_file():
        found: dict[str, Path] = runpy.run_path(str(_RULE))["of_agent"](_TREE)
        return found
    return {
        path.as_posix(): Path(str(path.locate()))
        for path in installed.files or ()
        if not path.parts[0].endswith(".dist-info") and path.parts[0] != ".." and path.suffix != ".pyc"
    }


def _packed(content: Mapping[str, bytes], *, record: str) -> bytes:
    """Pack a wheel without timestamps (binary distribution format 1.0: RECORD holds urlsafe base64 without padding)."""
    lines = []
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as archive:
        for place, data in sorted(content.items()):
            _put(archive, place, data)
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            lines.append(f"{place},sha256={digest},{len(data)}")
        _put(archive, record, "\n".join([*lines, f"{record},,", ""]).encode())
    return raw.getvalue()


def _put(archive: zipfile.ZipFile, place: str, data: bytes) -> None:
    member = zipfile.ZipInfo(place)
    member.external_attr = 0o644 << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    archive.writestr(member, data)

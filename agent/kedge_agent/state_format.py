"""``STATE/format``: the number of the state folder's format, and the upgrade of an older folder at the agent's start.

Format 2 names a slot's manifest ``manifest.json``; format 1, which has no ``format`` file, named it ``bundle.json``. An
upgrade renames within one folder and flushes it, so a power cut leaves each slot in one form or the other.
:mod:`kedge_agent.slots` reads both, so models serve before, during and after the upgrade, even on a read-only disk.
"""

from __future__ import annotations

import logging
from pathlib import Path

from kedge_agent.slots import FORMAT_1_MANIFEST, MANIFEST_FILE
from kedge_protocol import files
from kedge_protocol.errors import StorageError

FORMAT = 2
"""The format that this agent writes."""
_FILE = "format"

log = logging.getLogger(__name__)


def upgrade(state: Path) -> None:
    """Bring a state folder to :data:`FORMAT`. A folder that cannot be written stays as it is and is used all the same.

    Raises:
        StorageError: a newer agent wrote the folder, or ``format`` is not a number.
    """
    number = _number(state)
    if number == FORMAT:
        return
    try:
        for slot in sorted(state.glob("models/*/slots/*")):
            _rename_manifest(slot)
        files.write(state / _FILE, f"{FORMAT}\n".encode())
    except OSError as error:
        log.error("%s stays in format %d: %s", state, number, error.strerror)
        return
    log.info("%s is in format %d now", state, FORMAT)


def _number(state: Path) -> int:
    path = state / _FILE
    try:
        text = path.read_text(encoding="ascii", errors="replace").strip()
    except FileNotFoundError:
        return 1
    except OSError as error:
        log.error("%s cannot be read: %s", path, error.strerror)
        return 1
    if not text.isdecimal():
        raise StorageError(f"holds {text[:20]!r}, not a number", where=str(path), remedy="Write 1 into it")
    number = int(text)
    if number > FORMAT:
        raise StorageError(
            f"the state folder has format {number}, this agent knows {FORMAT}",
            where=str(state),
            remedy="Install the newer agent again, or give this one an empty [state] path",
        )
    return number


def _rename_manifest(slot: Path) -> None:
    """Rename a slot's manifest, unless a file of the bundle itself has the new name: that slot goes with its bundle."""
    old, new = slot / FORMAT_1_MANIFEST, slot / MANIFEST_FILE
    if old.exists() and not new.exists():
        old.rename(new)
        files.flush(slot)

"""The audit log: who did what to the fleet, when, and on what evidence. Entries are appended and never changed.

Each entry holds the SHA-256 of its predecessor's hash and its own content, so that an entry that is changed, taken out
or moved breaks the chain from there on (B. Schneier, J. Kelsey, "Secure Audit Logs to Support Computer Forensics",
1999, without its encryption). The database refuses updates and deletions of entries
by triggers. Whoever can write the file can still replace the whole chain: keep the head of the log elsewhere and
compare it (``kedge audit verify --expect``).
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kedge.fleet.database import Row, Session
from kedge_protocol import codec
from kedge_protocol.errors import FleetError

CONTROLLER = "controller"
"""The actor of everything that the controller does by itself."""
NOTHING = "0" * 64
"""The hash before the first entry."""
_HEAD = re.compile("[0-9a-f]{8,64}")


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One entry of the audit log.

    Attributes:
        number: 1, 2, 3, ….
        at: seconds since 1970 by the host's clock.
        actor: ``user@host``, ``controller``, or the name of a page's client.
        action: what was done, such as ``rollout.start``.
        subject: to what: a device, a release, ``rollout 7``, a key.
        evidence: JSON value: the figures or the options on which it was done.
        hash: SHA-256 (hex) of the previous entry's hash and this entry's content.
    """

    number: int
    at: float
    actor: str
    action: str
    subject: str
    evidence: Any
    hash: str


def person() -> str:
    """Return the actor of a command: the user of this process at this host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without an entry in the password file
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def append(
    session: Session, actor: str, action: str, subject: str, evidence: Mapping[str, Any] | None = None
) -> AuditEntry:
    """Append an entry in the caller's transaction: it is committed with what it describes, or not at all.

    Args:
        evidence: JSON values; non-finite numbers are refused.
    """
    last = session.row("SELECT id, hash FROM audit ORDER BY id DESC LIMIT 1")
    number, before = (1, NOTHING) if last is None else (last["id"] + 1, last["hash"])
    text = codec.encode(dict(evidence or {})).decode()
    at = session.now()
    found = _hash(before, number, at, actor, action, subject, text)
    session.run(
        "INSERT INTO audit (id, at, actor, action, subject, evidence, hash) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (number, at, actor, action, subject, text, found),
    )
    return AuditEntry(
        number=number, at=at, actor=actor, action=action, subject=subject, evidence=json.loads(text), hash=found
    )


def entries(session: Session, *, limit: int | None = None, subject: str | None = None) -> tuple[AuditEntry, ...]:
    """Return entries, newest first.

    Args:
        limit: so many; None for all.
        subject: only of this subject.
    """
    query = "SELECT * FROM audit WHERE :subject IS NULL OR subject = :subject ORDER BY id DESC LIMIT :limit"
    rows = session.rows(query, {"subject": subject, "limit": -1 if limit is None else limit})
    return tuple(_entry(row) for row in rows)


def verify(session: Session, *, expect: str | None = None) -> str:
    """Check the whole chain and return its head: the hash of the newest entry.

    Args:
        expect: a head that was noted earlier (at least its first 8 characters); the log must still hold it.

    Raises:
        FleetError: an entry was changed, taken out or moved, the log does not hold the expected head, or
            that is no hash.
    """
    if expect is not None and not _HEAD.fullmatch(expect):
        raise FleetError(f"{expect!r} is no hash of the audit log", remedy="Give its first 8 to 64 characters (hex)")
    before, seen = NOTHING, expect is None
    for number, row in enumerate(session.rows("SELECT * FROM audit ORDER BY id"), 1):
        content = (row["id"], row["at"], row["actor"], row["action"], row["subject"], row["evidence"])
        if row["id"] != number or row["hash"] != _hash(before, *content):
            raise FleetError(
                f"the audit log is broken at entry {number}: it was changed, or entries are missing before it",
                remedy="Compare with a backup of the state database: kedge controller backup",
            )
        before = row["hash"]
        seen = seen or before.startswith(expect or "")
    if not seen:
        raise FleetError(
            f"the audit log does not hold the entry {expect}: its end was cut off, or it is another fleet's log",
            remedy="Compare with a backup of the state database",
        )
    return before


def _hash(before: str, number: int, at: float, actor: str, action: str, subject: str, evidence: str) -> str:
    return hashlib.sha256(codec.encode([before, number, at, actor, action, subject, evidence])).hexdigest()


def _entry(row: Row) -> AuditEntry:
    return AuditEntry(
        number=row["id"],
        at=row["at"],
        actor=row["actor"],
        action=row["action"],
        subject=row["subject"],
        evidence=json.loads(row["evidence"]),
        hash=row["hash"],
    )

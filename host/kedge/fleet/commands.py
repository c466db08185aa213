"""One-time commands to a device: recorded by the CLI, sent by the controller, answered by the device."""

from __future__ import annotations

import uuid

from kedge.fleet.database import Session
from kedge.fleet.results import CommandQueued

KEPT_SECONDS = 24 * 3600.0
"""Answers are kept this long."""


def ask(session: Session, device: int, verb: str) -> str:
    """Record a command and return its number."""
    now = session.now()
    session.run("DELETE FROM command WHERE asked_at < ?", (now - KEPT_SECONDS,))
    cid = uuid.uuid4().hex
    session.run("INSERT INTO command (cid, device_id, verb, asked_at) VALUES (?, ?, ?, ?)", (cid, device, verb, now))
    return cid


def view(session: Session, cid: str) -> CommandQueued:
    """Return the state of a command."""
    query = "SELECT command.*, name FROM command JOIN device ON device.id = device_id WHERE cid = ?"
    row = session.row(query, (cid,))
    if row is None:
        return CommandQueued(device="", cid=cid, verb="", sent=False, ok=False, detail="the device was removed")
    return CommandQueued(
        device=row["name"],
        cid=cid,
        verb=row["verb"],
        sent=row["sent_at"] is not None,
        ok=None if row["ok"] is None else bool(row["ok"]),
        detail=row["detail"] or "",
    )

"""Judges presence from births, wills and signs of life, any of which may arrive late.

A broker sends a will when it gives a connection up, which may be long after the device is back: a will of another boot
or of an earlier session of this boot says nothing about now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from kedge_protocol.messages import Status


@dataclass(frozen=True)
class Presence:
    """A device's presence; ``boot_id`` is empty before its first message."""

    online: bool = False
    boot_id: str = ""
    session: int = 0


def after_status(known: Presence, status: Status) -> Presence:
    """Return the presence after a birth or a will."""
    same_boot = status.boot_id == known.boot_id
    # A sender that does not count its sessions leaves them at 0.
    stale = same_boot and 0 < status.session < known.session
    if stale or (not status.online and not same_boot and known.boot_id):
        return known
    return Presence(status.online, status.boot_id, status.session)


def after_word(known: Presence, boot_id: str) -> Presence:
    """Return the presence after a message that was not retained: its sender is online."""
    if boot_id == known.boot_id:
        return replace(known, online=True)
    return Presence(True, boot_id, 0)

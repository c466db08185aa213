"""Tells systemd that the service is ready and alive (sd_notify(3)): one datagram to ``NOTIFY_SOCKET``."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(message: str) -> None:
    """Send ``READY=1``, ``WATCHDOG=1``, ``STOPPING=1`` …; a no-op outside systemd."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.connect(address)
        sender.send(message.encode())

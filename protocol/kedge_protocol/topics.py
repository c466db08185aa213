"""Topic names, version 1.

All topics of a device lie below ``kedge/v1/d/{device}/``. A device's own user reads ``desired``, ``cmd`` and ``blk``
and writes the rest; docs/fleet.md has the access rules.

=================  =========  ===================================================================
level              retained   what
=================  =========  ===================================================================
``desired``        yes        controller → device: model name → bundle digest, monotonic version
``reported``       yes        device → controller: the device, the state of each model
``status``         yes, will  device → controller: presence with boot id
``cmd/{cid}``      never      controller → device: a command, done once
``ack/{cid}``      never      device → controller: its outcome
``req/{rid}``      never      device → controller: a request for blocks
``blk/{rid}``      never      controller → device: one block (binary, :mod:`kedge_protocol.blocks`)
``tele/{stream}``  never      device → controller: telemetry (``metrics``); samples that were asked for (``samples``)
=================  =========  ===================================================================

``kedge/v1/controller/status`` (retained, will) tells devices that a controller is present and when a new one starts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kedge_protocol.errors import ConfigError, MessageError

ROOT = "kedge/v1"
CONTROLLER_STATUS = f"{ROOT}/controller/status"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")


def checked_name(name: str, what: str = "name") -> str:
    """Return ``name`` if it is valid for a device, model, version or target: it becomes a topic level and a file name.

    Raises:
        ConfigError: it is not 1 to 64 letters, digits, ``.``, ``_`` or ``-``, or it begins with one of these signs.
    """
    if not _NAME.match(name):
        raise ConfigError(
            f"{name!r} is not a usable {what}",
            remedy="Use 1 to 64 letters, digits, '.', '_' or '-', beginning with a letter or digit",
        )
    return name


def desired(device: str) -> str:
    """Return the topic of a device's retained desired state."""
    return f"{ROOT}/d/{device}/desired"


def reported(device: str) -> str:
    """Return the topic of a device's retained reported state."""
    return f"{ROOT}/d/{device}/reported"


def status(device: str) -> str:
    """Return the topic of a device's retained presence, which is also the topic of its will."""
    return f"{ROOT}/d/{device}/status"


def command(device: str, cid: str) -> str:
    """Return the topic of a command, which is never retained."""
    return f"{ROOT}/d/{device}/cmd/{cid}"


def ack(device: str, cid: str) -> str:
    """Return the topic of a command's outcome."""
    return f"{ROOT}/d/{device}/ack/{cid}"


def request(device: str, rid: str) -> str:
    """Return the topic of a request for blocks."""
    return f"{ROOT}/d/{device}/req/{rid}"


def block(device: str, rid: str) -> str:
    """Return the topic of the blocks that answer request ``rid``."""
    return f"{ROOT}/d/{device}/blk/{rid}"


def telemetry(device: str, stream: str) -> str:
    """Return the topic of a telemetry stream."""
    return f"{ROOT}/d/{device}/tele/{stream}"


@dataclass(frozen=True)
class Topic:
    """A parsed device topic: ``kind`` is the level after the device, ``tail`` the rest, which may be empty."""

    device: str
    kind: str
    tail: str


def parse(topic: str) -> Topic:
    """Parse a device topic.

    Raises:
        MessageError: it is not a device topic.
    """
    parts = topic.split("/")
    if len(parts) < 5 or len(parts) > 6 or parts[:3] != ["kedge", "v1", "d"] or not _NAME.match(parts[3]):
        raise MessageError("not a topic of a device", where=topic[:120])
    return Topic(parts[3], parts[4], parts[5] if len(parts) == 6 else "")

"""Health of a controller: it touches a file while it runs and is connected; others check the file's age."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from kedge.fleet.database import state_folder
from kedge_protocol.errors import FleetError

log = logging.getLogger(__name__)

MARK_SECONDS = 5.0
"""Between two marks."""
MAX_AGE_SECONDS = 30.0
"""A controller whose mark is older does not work: it ended, hangs, or has lost its broker."""
_NAME = "controller.alive"


@dataclass(frozen=True, kw_only=True)
class Health:
    """A controller at work; ``age_seconds`` since it last said so."""

    state: Path
    age_seconds: float


class Mark:
    """The controller's own side.

    Args:
        state: the state folder.
    """

    def __init__(self, state: Path) -> None:
        self._file = state / _NAME
        self._next = 0.0

    def update(self, *, connected: bool) -> None:
        """Called each round; does nothing while the controller has no connection to its broker."""
        now = time.monotonic()
        if not connected or now < self._next:
            return
        self._next = now + MARK_SECONDS
        try:
            self._file.touch()
        except OSError as error:
            log.warning("%s cannot be written: %s", self._file, error.strerror)


def check(state: Path | None = None, *, max_age: float = MAX_AGE_SECONDS) -> Health:
    """Find out whether a controller runs on this state folder and is connected to its broker.

    Args:
        state: the state folder; None for :func:`kedge.fleet.database.state_folder`'s choice.
        max_age: seconds since it last said so.

    Raises:
        FleetError: it never did, or too long ago.
    """
    folder = state_folder(state)
    try:
        marked = (folder / _NAME).stat().st_mtime
    except OSError as error:
        raise FleetError(
            "no controller has been connected yet",
            where=str(folder),
            remedy="Run `kedge controller run`, and look at its log for the broker's answer",
        ) from error
    age = max(0.0, time.time() - marked)
    if age > max_age:
        raise FleetError(
            f"the controller has not been connected for {age:.0f} s",
            where=str(folder),
            remedy="Look at its log: it ended, hangs, or does not reach its broker",
        )
    return Health(state=folder, age_seconds=age)

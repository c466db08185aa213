"""Progress reports of tasks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Passed to every task; its reports reach the caller's ``on_progress``, and frequent ones are thinned out."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of ``what`` are done; a total of 0 means unknown."""

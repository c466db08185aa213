"""Progress reports of tasks."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Passed to every task. Its reports reach the caller's ``on_progress``; frequent ones are thinned out."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``what`` are done; a total of 0 means unknown."""

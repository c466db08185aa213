"""How a task says how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Given to every task; its reports reach ``on_progress`` of the caller, the fast ones thinned out."""

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``what`` are done; a total of 0 means unknown."""

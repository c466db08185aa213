"""The progress callback of a caller that wants none."""

from __future__ import annotations


def ignore_progress(what: str, done: int, total: int) -> None:
    """Do nothing."""

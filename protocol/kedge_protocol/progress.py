"""The progress callback for callers that need none."""

from __future__ import annotations


def ignore_progress(what: str, done: int, total: int) -> None:
    """Do nothing."""

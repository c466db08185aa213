"""Waiting for what a test expects, instead of sleeping for as long as it takes on a quiet machine."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest


def wait_for(condition: Callable[[], object], timeout: float = 120.0, what: object = "the condition") -> None:
    """Poll until ``condition()`` is true; fails the test after ``timeout`` seconds, which bound a fault and measure
    nothing: a busy machine takes many times as long as a quiet one. ``what`` may be a function that tells it then."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what() if callable(what) else what} did not come true in {timeout} s")
        time.sleep(0.02)

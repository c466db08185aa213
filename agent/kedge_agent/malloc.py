"""Keeps memory use low: returns memory that glibc's allocator holds back."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_ARENA_MAX = -8  # <malloc.h>


def one_arena() -> None:
    """Make all threads share one arena, since an arena of each thread would keep its peak. Call it before threads
    start."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return free memory to the kernel. It takes milliseconds, so call it after work, not during it."""
    gc.collect()
    # Other C libraries have no such call, and keep less.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

"""Little memory, for long: what glibc's allocator keeps for later is given back to the device."""

from __future__ import annotations

import contextlib
import ctypes
import gc

_M_ARENA_MAX = -8  # <malloc.h>


def one_arena() -> None:
    """Let all threads share one arena; each of its own would keep what it once used. Before threads are started."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def give_back() -> None:
    """Return free memory to the kernel. Takes milliseconds: at the end of work, not in it."""
    gc.collect()
    # Other C libraries have no such call, and keep less.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

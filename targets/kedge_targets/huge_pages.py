"""Moves a model's weights to huge pages of memory (Linux 6.1 and later).

A decoder reads all its weights for each token. On pages of 4 KiB the processor looks up an address for every 4096 bytes
of them; on pages of 2 MiB it seldom does. Allocators get such pages only where the process was started with
``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``, which a library cannot ask for, so what was filled is moved afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

_HUGE = 2 << 20
_COLLAPSE = 25
"""MADV_COLLAPSE of madvise(2), which Python has no name for yet."""
_FULL = 7 / 8
"""Least share of a huge page's bytes that is in use: moving takes the rest too."""
_SMALLEST = 4 << 20
_MAPS = Path("/proc/self/maps")


@contextlib.contextmanager
def moving() -> Iterator[None]:
    """Move the memory that is allocated and filled inside of the block to huge pages. Where the system has none, or
    none is free, nothing happens."""
    before = _anonymous()
    yield
    if not before:
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None, use_errno=True)
        for start, end in _grown(before, _anonymous()):
            for first, last in full_blocks(start, _resident(library, start, end)):
                library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _COLLAPSE)


def full_blocks(start: int, resident: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the address ranges of adjoining huge pages that are in use.

    Args:
        start: address of the first small page, a multiple of its size.
        resident: whether each small page is in memory.
    """
    small = mmap.PAGESIZE
    skipped = -start % _HUGE // small
    each = _HUGE // small
    count = max(len(resident) - skipped, 0) // each
    full = resident[skipped : skipped + count * each].reshape(count, each).mean(axis=1) >= _FULL
    edges = np.flatnonzero(np.diff(np.concatenate([[False], full, [False]]).astype(np.int8)))
    begin = start + skipped * small
    return [(begin + int(one) * _HUGE, begin + int(other) * _HUGE) for one, other in edges.reshape(-1, 2)]


def _anonymous() -> dict[int, int]:
    """Return start and end of each writable region without a file; of none where the system does not say."""
    found: dict[int, int] = {}
    if sys.platform != "linux":
        return found
    with contextlib.suppress(OSError):
        for line in _MAPS.read_text().splitlines():
            place, access, _, _, inode, *name = line.split(maxsplit=5)
            if access == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
                start, end = (int(part, 16) for part in place.split("-"))
                found[start] = end
    return found


def _grown(before: Mapping[int, int], after: Mapping[int, int]) -> list[tuple[int, int]]:
    return [(start, end) for start, end in after.items() if before.get(start) != end and end - start >= _SMALLEST]


def _resident(library: ctypes.CDLL, start: int, end: int) -> npt.NDArray[np.bool_]:
    """Return whether each page is in memory; of none if the region is gone."""
    pages = np.zeros((end - start) // mmap.PAGESIZE, np.uint8)
    library.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_void_p(pages.ctypes.data))
    return (pages & 1).astype(bool)

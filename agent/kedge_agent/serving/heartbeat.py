"""A memory page shared by the serving process and the agent: a counter that shows that the event loop is running, and
the model that each thread is calling. Writing it costs no system call, and the kernel keeps it when the writer dies.

::

    0   u64   beats of the event loop
    8   u64   1 while models are being loaded, when the loop may stand still for seconds
    64  64 bytes for each thread: 1 while it calls a runtime, 1 while the row is taken, the model's name (UTF-8, zeros)
"""

from __future__ import annotations

import mmap
import os
import threading

PAGE = 4096
EXIT_HUNG = 75
"""Exit status of a serving process that ended itself because a runtime hangs."""
_ROW = 64
_RUNNING, _TAKEN, _NAME = 0, 1, 2
_LONGEST_NAME = _ROW - _NAME


def new_page() -> int:
    """Create a page for a new process and return its file descriptor.

    Raises:
        OSError: no memory or file descriptor is left.
    """
    page = os.memfd_create("kedge-heartbeat", os.MFD_CLOEXEC)
    os.ftruncate(page, PAGE)
    return page


class Heartbeat:
    """The serving process's side of the page.

    Args:
        page: file descriptor of :func:`new_page`; None if nobody watches.
    """

    def __init__(self, page: int | None) -> None:
        self._view = memoryview(mmap.mmap(-1, PAGE) if page is None else mmap.mmap(page, PAGE))
        self._numbers = self._view[:64].cast("Q")
        self._taking = threading.Lock()

    def beat(self) -> None:
        """Count a round of the event loop."""
        self._numbers[0] += 1

    def loading(self, under_way: bool) -> None:
        """Record whether models are being loaded."""
        self._numbers[1] = int(under_way)

    def row(self, name: str) -> memoryview:
        """Return a row for a thread, which sets its first byte to 1 while it calls this model's runtime. If all rows
        are taken, the row is one that nobody reads."""
        with self._taking:
            for start in range(_ROW, PAGE, _ROW):
                row = self._view[start : start + _ROW]
                if not row[_TAKEN]:
                    row[_NAME:] = name.encode()[:_LONGEST_NAME].ljust(_LONGEST_NAME, b"\0")
                    row[_TAKEN] = 1
                    return row
        return memoryview(bytearray(_ROW))

    def give_back(self, row: memoryview) -> None:
        """Free the row of a thread that has ended."""
        with self._taking:
            row[_RUNNING] = row[_TAKEN] = 0


class HeartbeatReader:
    """The agent's side of the page.

    Args:
        page: file descriptor of :func:`new_page`; it may be closed afterwards.
    """

    def __init__(self, page: int) -> None:
        self._map = mmap.mmap(page, PAGE, access=mmap.ACCESS_READ)
        self._numbers = memoryview(self._map)[:64].cast("Q")

    @property
    def beats(self) -> int:
        """Return the number of rounds of the event loop."""
        return self._numbers[0]

    @property
    def loading(self) -> bool:
        """Return whether models are being loaded."""
        return self._numbers[1] != 0

    def running(self) -> set[str]:
        """Return the models that are being called, or were when the process died."""
        found = set()
        for start in range(_ROW, PAGE, _ROW):
            row = self._map[start : start + _ROW]
            if row[_TAKEN] and row[_RUNNING]:
                found.add(row[_NAME:].rstrip(b"\0").decode(errors="replace"))
        return found

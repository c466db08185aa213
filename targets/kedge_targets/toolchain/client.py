"""Calls a toolchain's driver: one process, kept for all calls of this process."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from kedge_protocol import memory
from kedge_protocol.errors import KedgeError, LoweringError, WorkerError
from kedge_targets.toolchain import store
from kedge_targets.toolchain.installation import Versions
from kedge_targets.worker import Worker

T = TypeVar("T")

_MEMORY_SHARE = 0.8  # of the machine's


class ToolchainClient:
    """The driver of one toolchain, started by the first call: loading a vendor's stack takes seconds to minutes.

    Args:
        name: the toolchain's name.
        start_seconds: the time limit for loading the stack, in seconds.
    """

    def __init__(self, name: str, *, start_seconds: float) -> None:
        self._name = name
        self._start_seconds = start_seconds
        self._lock = threading.Lock()
        self._kept: dict[Path, tuple[Worker, Versions]] = {}

    def call(self, task: str, request: Any, answer_type: type[T], *, deadline: float, where: str | None = None) -> T:
        """Run one of the driver's tasks.

        Args:
            where: the place named in an error of the driver itself; None for its own.

        Raises:
            ToolchainError: the toolchain is not installed.
            LoweringError: the driver crashed, or ran out of time or memory.
            KedgeError: the task raised it.
        """
        worker, _ = self._driver()
        with lowering_errors(where):
            return worker.call(task, request, answer_type, deadline=deadline)

    def start(self) -> None:
        """Start loading the driver while the caller prepares the graph; :meth:`call` waits for it, and raises if it
        cannot be loaded."""

        def load() -> None:
            with contextlib.suppress(KedgeError):
                self._driver()

        threading.Thread(target=load, name="kedge-driver-start", daemon=True).start()

    def versions(self) -> dict[str, str]:
        """Return the packages that the driver uses and their versions; raises like :meth:`call`."""
        return dict(self._driver()[1].packages)

    def _driver(self) -> tuple[Worker, Versions]:
        installed = store.find(self._name)
        with self._lock:
            if installed.folder not in self._kept:
                worker = installed.worker(memory_limit=int(memory.physical() * _MEMORY_SHARE))
                atexit.register(worker.close)
                with lowering_errors():
                    found = worker.call("version", {}, Versions, deadline=self._start_seconds)
                self._kept[installed.folder] = (worker, found)
            return self._kept[installed.folder]


@contextlib.contextmanager
def lowering_errors(where: str | None = None) -> Iterator[None]:
    """Turn the end of a driver's process into a :class:`LoweringError`."""
    try:
        yield
    except WorkerError as error:
        raise LoweringError(error.what, where=where or error.where, remedy=error.remedy) from error

"""The parent's side of the worker: :class:`Worker`."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar

from kedge_protocol import codec, errors
from kedge_protocol.errors import (
    KedgeError,
    WorkerCrashedError,
    WorkerError,
    WorkerMemoryError,
    WorkerTaskError,
    WorkerTimeoutError,
)
from kedge_targets.worker import environment
from kedge_targets.worker.process_group import Group

T = TypeVar("T")
OnProgress = Callable[[str, int, int], None]

_BOOTSTRAP = Path(__file__).resolve().parent / "bootstrap.py"
_TICK = 0.1  # seconds between two looks at deadline and memory
_PATIENCE = 2.0  # seconds that a child gets to end by itself at close
_TAIL_BYTES = 3000
_TAIL_LINES = 20


class Worker:
    """A child process, kept for several calls and restarted if it died.

    The child has its own session and process group, dies with its parent, and leaves no core file. A worker runs one
    call at a time; several workers may exist at the same time, each in its own thread.

    Args:
        name: used in messages and the log's file name.
        python: the interpreter; None for this one.
        driver: a program that speaks the worker's protocol with only the standard library; None for Kedge's own child.
        memory_limit: bytes for the child's whole process group, without mapped files; checked every 100 ms.
        log_dir: the folder for the child's output; None for ``KEDGE_LOG_DIR`` or the system's temporary folder.
        env: variables added to the child's environment.
    """

    def __init__(
        self,
        *,
        name: str,
        python: Path | None = None,
        driver: Path | None = None,
        memory_limit: int | None = None,
        log_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log: Path | None = None
        """The file with the child's output; removed at :meth:`close` unless a call failed."""
        self._python = python
        self._driver = driver
        self._memory_limit = memory_limit
        self._log_dir = environment.log_dir(log_dir)
        self._env = env
        self._group: Group | None = None
        self._scratch: Path | None = None
        self._buffer = b""
        self._failed = False
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def call(
        self,
        task: str,
        request: Any,
        answer_type: type[T],
        *,
        deadline: float,
        on_progress: OnProgress | None = None,
    ) -> T:
        """Run one task in the child.

        Args:
            task: ``module:function``, or the driver's name for the task.
            request: a dataclass or plain data.
            answer_type: the type of the answer.
            deadline: seconds, including the child's start.
            on_progress: called in this thread with what, done, total.

        Raises:
            WorkerTimeoutError, WorkerMemoryError: the child exceeded the limit and was killed.
            WorkerCrashedError: the child was killed by a signal, or ended without an answer.
            WorkerTaskError: the task raised an error that is not Kedge's.
            KedgeError: the task raised a Kedge error; it has the same class.
        """
        line = json.dumps({"task": task, "request": codec.unstructure(request)}).encode() + b"\n"
        with self._lock:
            try:
                message = self._exchange(line, deadline, on_progress)
            except BaseException:
                # Whatever happened (Ctrl-C among it), the child is in the middle of something: it cannot be kept.
                self._end(patience=0.0)
                raise
            if "error" in message:
                self._raise(message["error"])
            return codec.structure(message["answer"], answer_type, where=f"answer of {task}")

    def stop(self) -> None:
        """Stop the worker from another thread: the current call, and every later one, raises
        :class:`WorkerCrashedError`."""
        self._stopped.set()

    def close(self) -> None:
        """End the child and remove its log, unless a call failed."""
        with self._lock:
            self._end(patience=_PATIENCE)
            if self._scratch is not None:
                shutil.rmtree(self._scratch, ignore_errors=True)
                self._scratch = None
            if self.log is not None and not self._failed:
                self.log.unlink(missing_ok=True)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _started(self) -> Group:
        if self._group is not None and self._group.alive():
            return self._group
        self._end(patience=0.0)
        try:
            if self._scratch is None:
                self._scratch = Path(tempfile.mkdtemp(prefix=f"kedge-{self.name}-"))
            if self.log is None:
                handle, path = tempfile.mkstemp(prefix=f"kedge-{self.name}-", suffix=".log", dir=self._log_dir)
                self.log = Path(path)
            else:
                handle = os.open(self.log, os.O_WRONLY | os.O_APPEND)
        except OSError as error:
            raise WorkerError(f"no place for the worker's log: {error}", where=f"worker {self.name!r}") from error
        command = [str(self._python or sys.executable), str(_BOOTSTRAP)]
        command += ["--module", "kedge_targets.worker.child"] if self._driver is None else [str(self._driver)]
        try:
            self._group = Group(
                command,
                env=environment.of_child(self._scratch, self._log_dir, self._python, self._env),
                # A driver gets absolute paths only; its vendors may drop files where they stand.
                cwd=None if self._driver is None else self._scratch,
                log=handle,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise WorkerCrashedError(f"could not be started: {error}", where=f"worker {self.name!r}") from error
        finally:
            os.close(handle)
        self._buffer = b""
        return self._group

    def _end(self, *, patience: float) -> None:
        if self._group is not None:
            self._group.end(patience)
            self._group = None

    def _exchange(self, line: bytes, deadline: float, on_progress: OnProgress | None) -> dict[str, Any]:
        until = time.monotonic() + deadline
        group = self._started()
        pending = memoryview(line)
        poll = select.poll()
        poll.register(group.answers, select.POLLIN)
        poll.register(group.requests, select.POLLOUT)
        looked = time.monotonic()
        while True:
            now = time.monotonic()
            if self._stopped.is_set():
                raise WorkerCrashedError("was stopped", where=f"worker {self.name!r}")
            if now >= until:
                self._fail(WorkerTimeoutError, f"was killed after its deadline of {deadline:g} s")
            if now - looked >= _TICK:
                looked = now
                self._check_memory(group)
            for descriptor, _ in poll.poll(max(1.0, min(_TICK, until - now) * 1000)):
                if descriptor == group.requests:
                    pending = _write(group.requests, pending)
                    if not pending:
                        poll.unregister(group.requests)
                    continue
                for message in self._read(group):
                    if "progress" not in message:
                        return message
                    if on_progress is not None:
                        step = message["progress"]
                        on_progress(str(step["what"]), int(step["done"]), int(step["total"]))
            if not group.alive() and not select.select([group.answers], [], [], 0)[0]:
                self._ended(group)

    def _read(self, group: Group) -> Iterator[dict[str, Any]]:
        data = os.read(group.answers, 1 << 20)
        if not data:
            self._ended(group)
        self._buffer += data
        if len(self._buffer) > codec.MAX_DOCUMENT_BYTES:
            self._fail(WorkerError, f"answered more than {codec.MAX_DOCUMENT_BYTES} bytes")
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            message = codec.loads(line, where=f"answer of worker {self.name!r}", finite=False)
            if not isinstance(message, dict) or not message.keys() & {"progress", "answer", "error"}:
                self._fail(WorkerError, f"answered what is no answer: {line[:80]!r}")
            yield message

    def _check_memory(self, group: Group) -> None:
        if self._memory_limit is None:
            return
        used = group.memory()
        if used > self._memory_limit:
            self._fail(
                WorkerMemoryError,
                f"was killed: it held {used >> 20} MiB of memory, {self._memory_limit >> 20} MiB are allowed",
            )

    def _ended(self, group: Group) -> NoReturn:
        """Raise the error for a child that has ended or closed its answers."""
        until = time.monotonic() + _PATIENCE
        while group.alive() and time.monotonic() < until:
            time.sleep(0.01)
        if group.alive():
            self._fail(WorkerCrashedError, "closed its answers without one")
        status = group.status()
        if status >= 0:
            self._fail(WorkerCrashedError, f"exited with status {status} without an answer")
        try:
            name = signal.Signals(-status).name
        except ValueError:
            name = f"signal {-status}"
        hint = " (the kernel's, where memory ran out)" if status == -signal.SIGKILL else ""
        self._fail(WorkerCrashedError, f"was killed by {name}{hint}")

    def _fail(self, kind: type[WorkerError], what: str) -> NoReturn:
        self._failed = True
        raise kind(what, where=f"worker {self.name!r}", remedy=self._last_words())

    def _raise(self, error: Mapping[str, Any]) -> NoReturn:
        kind = str(error.get("kind"))
        found = getattr(errors, kind, None)
        if isinstance(found, type) and issubclass(found, KedgeError):
            raise found(str(error.get("what")), where=error.get("where"), remedy=error.get("remedy"))
        self._fail(WorkerTaskError, f"{kind}: {error.get('what')}")

    def _last_words(self) -> str:
        """Return the log's tail and path."""
        if self.log is None:
            return "It left no log"
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
            if tail:
                return f"Its log is {self.log} and ends:\n" + "\n".join(tail)
        return f"Its log, {self.log}, is empty"


def _write(descriptor: int, data: memoryview) -> memoryview:
    """Write as much as the pipe accepts now and return the rest. A dead child is detected by its answers."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except BrokenPipeError:
        return data[:0]

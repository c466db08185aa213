"""Runs a child in its own process group: starts it, watches its memory, kills all of it."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kedge_targets.worker.bootstrap import PARENT_VARIABLE

ANSWER_VARIABLE = "KEDGE_ANSWER_FD"
_SCAN_SECONDS = 1.0  # how often new members of the group are looked for


@functools.cache
def _starter(pid: int) -> ThreadPoolExecutor:
    """Return the thread that starts all children of process ``pid``.

    Linux sends a child its parent's death signal when the *thread* that started it ends, so no caller's thread may
    do it.
    """
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="kedge-worker-start")


class Group:
    """A running child and all processes that it starts.

    Attributes:
        requests: the file descriptor for writing requests; non-blocking.
        answers: the file descriptor for reading answers.
    """

    def __init__(self, command: Sequence[str], *, env: Mapping[str, str], cwd: Path | None, log: int) -> None:
        self.answers, theirs = os.pipe()
        environment = {**env, ANSWER_VARIABLE: str(theirs), PARENT_VARIABLE: str(os.getpid())}
        start = functools.partial(
            subprocess.Popen,
            list(command),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=(theirs,),
            env=environment,
            cwd=cwd,
            start_new_session=True,
        )
        try:
            self._process = _starter(os.getpid()).submit(start).result()
        except BaseException:
            os.close(self.answers)
            raise
        finally:
            os.close(theirs)
        self.pid = self._process.pid
        stdin = self._process.stdin
        if stdin is None:  # for the type checker: stdin=PIPE always makes one
            raise RuntimeError("no pipe to the child")
        self._stdin = stdin
        self.requests = stdin.fileno()
        os.set_blocking(self.requests, False)
        self._members = [self.pid]
        self._scanned = time.monotonic()

    def alive(self) -> bool:
        """Return whether the child is still running. It is not reaped here, so that its group id is not reused."""
        if self._process.returncode is not None:
            return False
        state = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        return state is None

    def memory(self) -> int:
        """Return the memory, in bytes, of the whole group that only swap could free: anonymous and shared memory.

        Mapped files (a data set, a model) are not counted: the kernel drops their pages when it needs to.
        """
        now = time.monotonic()
        if now - self._scanned > _SCAN_SECONDS:
            self._members = _members(self.pid)
            self._scanned = now
        return sum(_memory_of(pid) for pid in self._members)

    def end(self, patience: float) -> None:
        """Close the request pipe, let the child finish within ``patience`` seconds, then kill the rest."""
        with contextlib.suppress(OSError):
            self._stdin.close()
        until = time.monotonic() + patience
        while self.alive() and time.monotonic() < until:
            time.sleep(0.01)
        self.kill()

    def kill(self) -> int:
        """Kill the whole group and close the pipes; return the child's exit status as in :mod:`subprocess`."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            with contextlib.suppress(OSError):
                self._stdin.close()
            os.close(self.answers)
        return self._process.returncode

    def status(self) -> int:
        """Return the exit status of a child that has ended by itself, and kill the rest of its group."""
        return self.kill()


def _members(group: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):  # noqa: PTH208 -- names suffice; this runs every second
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError):
                stat = Path("/proc", entry, "stat").read_text(encoding="utf-8", errors="replace")
                # The command's name stands in brackets and may hold anything; the group is the third field after it.
                if int(stat.rpartition(")")[2].split()[2]) == group:
                    found.append(int(entry))
    return found


def _memory_of(pid: int) -> int:
    kibibytes = 0
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("RssAnon:", "RssShmem:")):
                kibibytes += int(line.split()[1])
    return kibibytes * 1024

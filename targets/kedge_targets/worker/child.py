"""The child's loop: reads one JSON line per request, writes JSON lines of progress and one answer.

Imports nothing heavy: each task imports what it needs.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
import time
import traceback
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedge_protocol import codec, errors
from kedge_targets.worker.process_group import ANSWER_VARIABLE

_PROGRESS_SECONDS = 0.05


class _Answers:
    """Sends progress and answers to the parent."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "wb")
        self._last = ("", 0.0)

    def send(self, kind: str, value: Any) -> None:
        self._file.write(json.dumps({kind: value}).encode() + b"\n")
        self._file.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """Report progress; see :class:`kedge_targets.worker.Progress`."""
        now = time.monotonic()
        if what == self._last[0] and done != total and now - self._last[1] < _PROGRESS_SECONDS:
            return
        self._last = (what, now)
        self.send("progress", {"what": what, "done": int(done), "total": int(total)})


def _requests() -> io.BufferedReader:
    """Return the request pipe, moved away from standard input so that no task reads it by mistake."""
    moved = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    return os.fdopen(moved, "rb")


def find(task: str) -> tuple[Callable[..., Any], type[Any]]:
    """Return a task's function and the type of its request.

    Args:
        task: ``module:function``; the function's first parameter is ``request``, with its type annotated.
    """
    module, _, name = task.partition(":")
    function = getattr(importlib.import_module(module), name)
    return function, typing.get_type_hints(function)["request"]


def described(error: BaseException) -> dict[str, Any]:
    """Return an error as sent on the wire: a Kedge error with the nearest class of the tree, others with their type's
    name."""
    if isinstance(error, errors.KedgeError):
        kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == errors.__name__)
        return {"kind": kind, "what": error.what, "where": error.where, "remedy": error.remedy}
    return {"kind": type(error).__name__, "what": str(error), "where": None, "remedy": None}


def _go_first() -> None:
    """Where memory runs out, let the kernel end this process rather than what serves or what somebody works with
    (proc_pid_oom_score_adj(5))."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500", encoding="ascii")


def main() -> None:
    """Serve until the parent closes the pipe."""
    _go_first()
    answers = _Answers(int(os.environ.pop(ANSWER_VARIABLE)))
    requests = _requests()
    for line in requests:
        message = json.loads(line)
        try:
            function, kind = find(message["task"])
            request = codec.structure(message["request"], kind, where=message["task"])
            answer = codec.unstructure(function(request, answers.progress))
        except BaseException as error:  # noqa: BLE001 -- a vendor's sys.exit() too is an answer; the parent judges
            if not isinstance(error, errors.KedgeError):
                traceback.print_exc()
            answers.send("error", described(error))
        else:
            answers.send("answer", answer)
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()

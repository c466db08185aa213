"""The loop of every toolchain's driver: it speaks the worker's protocol (docs/architecture.md), with one JSON request
per line on standard input, and JSON lines of progress and one answer on the file descriptor ``KEDGE_ANSWER_FD``.

It runs in the toolchain's own environment: standard library only, Python 3.9 or newer, and never Kedge. A driver finds
it beside Kedge's own toolchain package::

    sys.path.append(str(Path(__file__).resolve().parents[3] / "toolchain" / "driver_side"))
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

_NO_ANSWER = "KEDGE_ANSWER_FD is not set: this program is run by Kedge's worker"


class RefusedError(Exception):
    """An error with the name of its class in Kedge's tree."""

    def __init__(self, kind: str, what: str, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(what)
        self.wire = {"kind": kind, "what": what, "where": where, "remedy": remedy}


class Answers:
    """Sends progress and answers to the worker."""

    def __init__(self) -> None:
        if "KEDGE_ANSWER_FD" not in os.environ:
            sys.exit(_NO_ANSWER)
        descriptor = int(os.environ.pop("KEDGE_ANSWER_FD"))
        os.set_inheritable(descriptor, False)
        self._file = os.fdopen(descriptor, "wb")

    def send(self, kind: str, value: Any) -> None:
        """Send one line."""
        self._file.write(json.dumps({kind: value}).encode() + b"\n")
        self._file.flush()

    def progress(self, what: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` steps of ``what`` are done; a total of 0 means unknown."""
        self.send("progress", {"what": what, "done": done, "total": total})


def versions(packages: Iterable[str]) -> Mapping[str, Any]:
    """Return the answer to the task ``version``: the Python version and the packages installed here."""
    return {
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }


def serve(answers: Answers, tasks: Mapping[str, Callable[[Any], Any]]) -> None:
    """Serve until the worker closes the pipe. An error that has the attribute ``wire`` is sent as that."""
    for line in sys.stdin:
        message = json.loads(line)
        try:
            answer = tasks[message["task"]](message["request"])
        except BaseException as error:  # noqa: BLE001 -- a vendor's sys.exit() too is an answer; the parent judges
            wire = getattr(error, "wire", None)
            if wire is None:
                traceback.print_exc()
                wire = {"kind": type(error).__name__, "what": str(error), "where": None, "remedy": None}
            answers.send("error", wire)
        else:
            answers.send("answer", answer)
        sys.stdout.flush()
        sys.stderr.flush()

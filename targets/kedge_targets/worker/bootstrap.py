"""A child's first step, followed by its program: ``python bootstrap.py PROGRAM.py``, or ``--module NAME``.

It is run by path with any Python, including a toolchain's, so it needs only the standard library. The process is bound
to its parent's life here and not in ``preexec_fn``, which is not safe in a parent with threads.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys

PARENT_VARIABLE = "KEDGE_PARENT_PID"
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def bind_to_parent() -> None:
    """Make this process die with its parent, and leave no core file."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    parent = os.environ.pop(PARENT_VARIABLE, "")
    # The parent may have died before the line above: then nobody will send the signal.
    if parent and os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    """Bind to the parent, then run the program."""
    bind_to_parent()
    del sys.argv[0], sys.path[0]  # this file's folder is no place to import from
    if sys.argv[0] == "--module":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))  # noqa: PTH100, PTH120 -- light
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

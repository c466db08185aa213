"""The worker: a child process for everything that must not crash its caller.

::

    with Worker(name="evaluate", memory_limit=2 << 30) as worker:
        answer = worker.call("package.module:task", request, Answer, deadline=120.0)

Files: ``parent`` (:class:`Worker`), ``process_group`` (starts, watches and kills a process group), ``environment`` (the
environment of every child), ``bootstrap`` (a child's first step), ``child`` (the loop that runs tasks). The protocol is
described in docs/architecture.md.
"""

from kedge_targets.worker.parent import OnProgress, Worker
from kedge_targets.worker.progress import Progress

__all__ = ["OnProgress", "Progress", "Worker"]

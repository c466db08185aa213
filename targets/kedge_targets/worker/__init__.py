"""The one worker: a child process for everything that must not take its caller down.

::

    with Worker(name="evaluate", memory_limit=2 << 30) as worker:
        answer = worker.call("package.module:task", request, Answer, deadline=120.0)

Files: ``parent`` (:class:`Worker`), ``group`` (starting, watching and killing a process group), ``environment``
(what every child is told), ``bootstrap`` (a child's first act), ``child`` (the loop that runs tasks). The wire is
described in docs/architecture.md.
"""

from kedge_targets.worker.parent import OnProgress, Worker
from kedge_targets.worker.progress import Progress

__all__ = ["OnProgress", "Progress", "Worker"]

"""Shows the progress of a compilation: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import click

from kedge.search.results import ProgressCallback

_SECONDS = 10.0
"""The interval after which the same work is reported again, in seconds."""


@contextlib.contextmanager
def progress_display() -> Iterator[ProgressCallback]:
    """Show one bar per target if standard error is a terminal, otherwise one line per piece of work."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines(lambda line: click.echo(line, err=True))
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.fields[who]:<16}"), TextColumn("{task.description:<22}"), BarColumn())
    with Progress(*columns, MofNCompleteColumn(), TimeElapsedColumn(), console=console, transient=True) as bars:
        rows: dict[str, TaskID] = {}

        def on_progress(who: str, what: str, done: int, total: int) -> None:
            if who not in rows:
                rows[who] = bars.add_task(what, who=who, total=None)
            bars.update(rows[who], description=what, completed=done, total=total or None)

        yield on_progress


class Lines:
    """Writes a line when a target begins other work, and every ten seconds while the work stays the same; thread-safe.

    Args:
        write: writes a line.
        clock: returns the time in seconds.
    """

    def __init__(self, write: Callable[[str], object], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._write = write
        self._clock = clock
        self._began = clock()
        self._last: dict[str, tuple[str, float]] = {}
        self._alone = threading.Lock()

    def __call__(self, who: str, what: str, done: int, total: int) -> None:
        """Report progress; see :data:`kedge.search.results.ProgressCallback`."""
        with self._alone:
            now = self._clock()
            before, when = self._last.get(who, ("", now))
            if what == before and now - when < _SECONDS:
                return
            self._last[who] = (what, now)
            count = f" {done} of {total}" if total else ""
            self._write(f"{now - self._began:7.1f} s  {who}: {what}{count}")

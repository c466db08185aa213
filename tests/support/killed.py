"""Runs a piece of work in a child that is killed with SIGKILL before its Nth SQL statement; ``COMMIT`` is one of
them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedge.fleet import database
from kedge.fleet.service import FleetService
from kedge.fleet.staged.engine import Engine

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.killed"])


def tick(service: FleetService, now: float) -> None:
    """Run one round of all staged rollouts."""
    Engine(service.database).tick(now=now)


def abort(service: FleetService) -> None:
    """Abort the latest rollout."""
    service.rollout_abort()


def is_killed(state: Path, now: float, statement: int, work: Callable[..., Any], *arguments: object) -> bool:
    """Run ``work(service, *arguments)`` on a state folder; return whether it was killed, or had ended before.

    Args:
        now: the fleet's clock.
        work: a function of a light module, since each child imports it.
        statement: which statement it dies before, from 1 on; 0 for none.
    """
    child = _CONTEXT.Process(target=_work, args=(state, now, statement, work, arguments))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), f"the child ended with {child.exitcode}"
    return child.exitcode != 0


def _work(state: Path, now: float, statement: int, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    seen = 0

    def count(text: str) -> None:
        nonlocal seen
        seen += 1
        if seen == statement:
            os.kill(os.getpid(), signal.SIGKILL)

    service = FleetService(state, clock=lambda: now)
    service.database.close()
    connected = database._connected

    def traced(path: Path) -> sqlite3.Connection:
        connection = connected(path)
        connection.set_trace_callback(count)
        return connection

    database._connected = traced
    work(service, *arguments)

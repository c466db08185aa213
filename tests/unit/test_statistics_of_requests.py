"""Requests are counted by each thread for itself, whatever becomes of the threads."""

from __future__ import annotations

import gc
import threading

import pytest

from kedge_agent.serving.statistics import Statistics

pytestmark = pytest.mark.device


def count(statistics: Statistics) -> None:
    statistics.mine().record(samples=2, queue=0, input=1, infer=2, output=3)


def test_threads_that_come_and_go_leave_their_sums_and_nothing_else() -> None:
    statistics = Statistics()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(200):
        thread = threading.Thread(target=count, args=(statistics,))
        thread.start()
        thread.join()
    total = statistics.total()
    assert (total.answered, total.samples, total.answered_ns) == (200, 400, 1200)
    gc.collect()
    assert len(gc.get_objects()) - before < 100


def test_threads_that_run_at_once_do_not_share_a_row() -> None:
    statistics = Statistics()
    both = threading.Barrier(2)
    rows = []

    def work() -> None:
        both.wait()
        rows.append(statistics.mine())
        both.wait()

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows[0] is not rows[1]

"""Telemetry is summed by bundle as it arrives, in rows of bounded size."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from kedge.fleet import call_figures, drift
from kedge.fleet.call_figures import MAX_BLOCKS, POINTS, Figures
from kedge.fleet.database import Database
from kedge_protocol import latency_buckets
from kedge_protocol.drift import MAX_STREAMS
from kedge_protocol.messages import ModelTelemetry, Telemetry
from kedge_protocol.telemetry import GenerationTelemetry

OLD, NEW = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def message(digest: str, *, calls: int = 50, errors: int = 1, memory: int = 10_000_000, **values: object) -> Telemetry:
    counts = [0] * latency_buckets.BUCKETS
    counts[latency_buckets.bucket_of(10_000_000)] = calls
    model: dict[str, object] = {
        "digest": digest,
        "inferences": calls,
        "errors": errors,
        "inferences_total": 0,
        "errors_total": 0,
        "latency_ms": {"p50": 10.0, "p95": 20.0, "p99": 40.0, "mean": 11.0},
        "memory_bytes": memory,
    }
    return Telemetry(
        boot_id="b",
        seq=1,
        interval=5.0,
        models={"tiny": ModelTelemetry(**(model | values))},  # type: ignore[arg-type]
        cpu_percent=1.0,
        memory_total_bytes=2**30,
        memory_available_bytes=2**29,
        agent_bytes=2**20,
        free_bytes=2**30,
        temperature_c=50.0,
    )


class Fleet:
    """A database with devices, to which telemetry comes."""

    def __init__(self, folder: Path, devices: int = 1) -> None:
        self.database = Database(folder)
        with self.database.write() as session:
            session.run_many(
                "INSERT INTO device VALUES (?, ?, 'rpi4', '{}', 0, 0, 0, 0)",
                [(number, f"d{number}") for number in range(1, devices + 1)],
            )

    def tell(self, at: float, *messages: Telemetry, device: int = 1) -> None:
        with self.database.write() as session:
            call_figures.note(session, {device: [(at, one) for one in messages]})

    def rows(self, device: int = 1) -> dict[str, Figures]:
        with self.database.read() as session:
            rows = session.rows("SELECT * FROM call_figures WHERE device_id = ? ORDER BY until", (device,))
        return {row["digest"]: call_figures.decode(row["since"], row["until"], row["document"]) for row in rows}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path)


def test_sketches_are_of_all_streams_that_ever_came_and_of_no_more_than_there_can_be(fleet: Fleet) -> None:
    """A device leaves out a stream of which an interval has no value."""
    fleet.tell(1000.0, message(OLD))
    fleet.tell(1005.0, message(OLD, drift={"input/x/mean": (1, 2)}))
    fleet.tell(1010.0, message(OLD, drift={"input/x/mean": (1, 2), "output/y/class": (3, 0)}))
    assert fleet.rows()[OLD].drift == {"input/x/mean": [2, 4], "output/y/class": [3, 0]}
    for number in range(100):
        lie = message(OLD, drift={f"input/{number}/mean": (1, 2)})
        fleet.tell(1015.0 + number, lie)
        with fleet.database.write() as session:
            drift.note(session, 1, [(1015.0 + number, lie)])
    assert len(fleet.rows()[OLD].drift) == MAX_STREAMS + 1
    with fleet.database.read() as session:
        kept = session.value("SELECT fresh FROM drift_sketch WHERE device_id = 1")
    assert len(json.loads(kept)) == MAX_STREAMS + 1


def test_calls_are_summed_by_minutes_and_the_first_message_after_a_switch_is_left_out(fleet: Fleet) -> None:
    for second in range(0, 605, 5):
        fleet.tell(1000.0 + second, message(OLD))
    found = fleet.rows()[OLD]
    assert found.calls.blocks == 10
    assert found.calls.total == 51 * (10 * 12 - 1)
    assert found.calls.bad == 10 * 12 - 1
    assert found.p99.count == 10
    assert found.p99.mean == pytest.approx(math.log(40.0))
    assert found.temperature.mean == pytest.approx(50.0)
    assert [value for _, value in found.memory] == [10_000_000] * 10


def test_a_histogram_is_merged_and_read_rather_than_the_messages_quantiles(fleet: Fleet) -> None:
    buckets = latency_buckets.sparse([0] * 100 + [5] + [0] * (latency_buckets.BUCKETS - 101))
    for second in range(0, 185, 5):
        fleet.tell(second, message(OLD, latency_buckets=buckets))
    found = fleet.rows()[OLD]
    low, high = latency_buckets.bounds(100)
    assert low / 1e6 <= math.exp(found.p99.mean) <= high / 1e6
    assert found.buckets == {"100": 5 * (3 * 12 - 1)}


def test_a_mixed_interval_counts_no_calls(fleet: Fleet) -> None:
    for second in range(0, 125, 5):
        fleet.tell(second, message(OLD, mixed=True))
    assert fleet.rows()[OLD].calls.total == 0


def test_a_device_that_comes_back_to_a_bundle_begins_it_anew_and_two_bundles_are_kept(fleet: Fleet) -> None:
    third = "sha256:" + "3" * 64
    for start, digest in ((0, OLD), (1000, NEW), (2000, OLD)):
        for second in range(0, 305, 5):
            fleet.tell(start + second, message(digest))
    assert list(fleet.rows()) == [NEW, OLD]
    assert fleet.rows()[OLD].since == 2000
    assert fleet.rows()[OLD].calls.blocks == 5
    fleet.tell(3000, message(third))
    assert list(fleet.rows()) == [OLD, third]


def test_messages_of_one_round_may_hold_a_switch(fleet: Fleet) -> None:
    fleet.tell(10.0, message(OLD), message(NEW))
    assert set(fleet.rows()) == {OLD, NEW}


def test_a_row_stays_small_however_long_it_covers(fleet: Fleet) -> None:
    figures = Figures(since=0.0, until=0.0)
    buckets = {str(bucket): 1000 for bucket in range(latency_buckets.BUCKETS)}
    for minute in range(3 * MAX_BLOCKS):
        one = message(OLD, memory=10_000_000 + 1000 * minute, latency_buckets=buckets)
        figures.add(60.0 * minute, one, one.models["tiny"], count=True)
    assert len(figures.memory) <= POINTS
    assert figures.calls.blocks <= MAX_BLOCKS
    assert len(figures.encode()) < 8192
    assert figures.calls.rate == pytest.approx(1 / 51, rel=0.01)
    steps = {round(later[0] - earlier[0]) for earlier, later in zip(figures.memory, figures.memory[1:], strict=False)}
    assert max(steps) <= 2 * min(steps)


@pytest.mark.parametrize(
    "lie",
    [
        {"inferences": -5},
        {"errors": 1 << 70},
        {"latency_ms": {"p95": -1.0, "p99": 1e300}},
        {"latency_buckets": {"x": 1, "999999": 4, "-3": 2, "7": -1}},
        {"memory_bytes": 1 << 80},
    ],
)
def test_figures_that_cannot_be_are_left_out(fleet: Fleet, lie: dict[str, Any]) -> None:
    for second in range(0, 125, 5):
        fleet.tell(second, message(OLD, **lie))
    found = fleet.rows()[OLD]
    assert all(math.isfinite(value) for value in (found.p99.mean, found.calls.squares))
    assert found.calls.bad <= found.calls.total


def test_what_is_written_is_what_was_there_before(fleet: Fleet) -> None:
    for second in range(0, 100, 5):
        fleet.tell(second, message(OLD))
    first = fleet.rows()[OLD]
    assert call_figures.decode(first.since, first.until, first.encode()) == first
    assert first.block is not None


def test_of_a_language_model_tokens_are_summed_and_whole_answers_are_not(tmp_path: Path) -> None:
    def buckets(milliseconds: float) -> dict[str, int]:
        return {str(latency_buckets.bucket_of(int(milliseconds * 1e6))): 40}

    fleet = Fleet(tmp_path)
    # The answers become longer and longer; a token takes what it took.
    for turn in range(8):
        paces = GenerationTelemetry(first_token_buckets=buckets(250.0), token_buckets=buckets(20.0))
        told = message(OLD, latency_ms={"p50": 1e3, "p95": 1e3 * 2**turn, "p99": 1e3 * 2**turn}, generation=paces,
                       latency_buckets=buckets(1e3 * 2**turn))  # fmt: skip
        fleet.tell(60.0 * turn, told)
    with fleet.database.read() as session:
        row = session.row("SELECT * FROM call_figures")
    assert row is not None
    figures = call_figures.decode(row["since"], row["until"], row["document"])
    assert figures.p95.count == figures.first.count >= 5
    assert math.exp(figures.p95.mean) == pytest.approx(20.0, rel=0.1)
    assert math.exp(figures.first.mean) == pytest.approx(250.0, rel=0.1)
    # A row of the version before has none.
    older = {name: value for name, value in json.loads(figures.encode()).items() if name != "first"}
    assert call_figures.decode(0.0, 1.0, json.dumps(older).encode()).first.count == 0

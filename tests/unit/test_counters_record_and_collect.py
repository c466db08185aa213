"""Counting: what is recorded by threads and processes is what is collected, whatever else lies in the folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge_agent.counters import TOTALS_FILE, Counter, Totals, collect, open_counter
from kedge_protocol import latency_buckets
from kedge_protocol.latency_buckets import BUCKETS

pytestmark = pytest.mark.device

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64

_CHILD = """
import sys
from pathlib import Path
from kedge_agent.counters import Counter
counter = Counter(Path(sys.argv[1]), digest=sys.argv[2], generation=1)
for index in range(int(sys.argv[3])):
    counter.record(1_000_000)
print("counted", flush=True)
sys.stdin.read()
"""


def _child(folder: Path, count: int, digest: str = A) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), digest, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "counted\n"
    return child


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != TOTALS_FILE)


def test_records_and_errors_are_collected_while_the_writer_lives(tmp_path: Path) -> None:
    counter = Counter(tmp_path, digest=A, generation=3)
    for nanoseconds in (500, 1_000_000, 2_000_000):
        counter.record(nanoseconds)
    counter.error()
    found = collect(tmp_path)
    assert (found.inferences, found.errors, found.nanoseconds) == (3, 1, 3_000_500)
    assert found.digests == {A: 3}
    assert sum(found.buckets) == 3
    assert len(_files(tmp_path)) == 1
    counter.close()


def test_an_empty_or_missing_folder_has_no_counts(tmp_path: Path) -> None:
    assert collect(tmp_path) == Totals()
    assert collect(tmp_path / "missing") == Totals()
    assert Totals().latency_ms() == {}


def test_threads_lose_nothing_and_their_rows_are_used_again(tmp_path: Path) -> None:
    counter = Counter(tmp_path, digest=A, generation=1)

    def work() -> None:
        for _ in range(500):
            counter.record(1_000_000)

    # More threads than one chunk of the file has rows, several times over.
    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    (name,) = _files(tmp_path)
    assert collect(tmp_path).inferences == 3 * 40 * 500
    assert (tmp_path / name).stat().st_size <= 3 * 65536 + 65536
    counter.close()


def test_a_closed_counter_is_folded_and_removed_once(tmp_path: Path) -> None:
    first = Counter(tmp_path, digest=A, generation=1)
    first.record(1_000_000)
    first.close()
    second = Counter(tmp_path, digest=B, generation=2)
    second.record(2_000_000)
    for _ in range(3):
        found = collect(tmp_path)
        assert found.inferences == 2
        assert found.digests == {A: 1, B: 1}
    assert len(_files(tmp_path)) == 1
    second.close()
    assert collect(tmp_path) == found
    assert _files(tmp_path) == []


def test_counts_of_a_killed_process_stay(tmp_path: Path) -> None:
    child = _child(tmp_path, 1000)
    assert collect(tmp_path).inferences == 1000
    assert len(_files(tmp_path)) == 1
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert collect(tmp_path).inferences == 1000
    assert _files(tmp_path) == []
    assert collect(tmp_path).inferences == 1000


def test_a_file_named_after_a_living_process_is_not_taken_for_living(tmp_path: Path) -> None:
    """A reused process number: the name says this very process, nobody holds the file."""
    child = _child(tmp_path, 7)
    child.kill()
    child.wait()
    (name,) = _files(tmp_path)
    (tmp_path / name).rename(tmp_path / f"{os.getpid()}-000000000000")
    assert collect(tmp_path).inferences == 7
    assert _files(tmp_path) == []


def test_reading_only_folds_nothing(tmp_path: Path) -> None:
    counter = Counter(tmp_path, digest=A, generation=1)
    counter.record(1)
    counter.close()
    assert collect(tmp_path, fold=False).inferences == 1
    assert len(_files(tmp_path)) == 1
    assert not (tmp_path / TOTALS_FILE).exists()


def test_a_crash_between_folding_and_removing_counts_nothing_twice(tmp_path: Path) -> None:
    counter = Counter(tmp_path, digest=A, generation=1)
    counter.record(1_000_000)
    counter.close()
    (name,) = _files(tmp_path)
    raw = (tmp_path / name).read_bytes()
    before = collect(tmp_path)
    (tmp_path / name).write_bytes(raw)
    assert collect(tmp_path) == before
    assert _files(tmp_path) == []
    assert collect(tmp_path) == before


@pytest.mark.parametrize("where", ["header", "cut", "empty", "text", "size"])
def test_damaged_files_are_passed_over(tmp_path: Path, where: str) -> None:
    whole = Counter(tmp_path, digest=A, generation=1)
    whole.record(1_000_000)
    (name,) = _files(tmp_path)
    raw = bytearray((tmp_path / name).read_bytes())
    if where == "header":
        raw[:8] = b"\xff" * 8
    damaged = {"cut": raw[:40], "empty": b"", "text": b"hello", "size": raw[:8] + b"\xff" * 8 + raw[16:]}
    (tmp_path / "99-damaged").write_bytes(damaged.get(where, raw))
    found = collect(tmp_path)
    assert found.inferences == 1
    assert (tmp_path / "99-damaged").exists()
    whole.close()


@given(st.binary(max_size=9000))
@settings(max_examples=60, deadline=None)
def test_no_bytes_break_the_collection(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.mktemp("counters")
    (folder / "1-x").write_bytes(raw)
    (folder / "2-x").write_bytes(b"KDGCNT01" + raw)
    (folder / TOTALS_FILE).write_bytes(raw)
    assert collect(folder) == Totals()


def test_links_fifos_and_folders_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    counter = Counter(tmp_path / "outside", digest=A, generation=1)
    counter.record(1)
    folder = tmp_path / "counters"
    folder.mkdir()
    (folder / "1-link").symlink_to(next((tmp_path / "outside").iterdir()))
    os.mkfifo(folder / "2-fifo")
    (folder / "3-folder").mkdir()
    assert collect(folder) == Totals()
    counter.close()


def test_damaged_totals_start_anew(tmp_path: Path) -> None:
    (tmp_path / TOTALS_FILE).write_text(json.dumps({"inferences": 5, "buckets": [1, 2]}))
    counter = Counter(tmp_path, digest=A, generation=1)
    counter.record(1)
    assert collect(tmp_path).inferences == 1
    counter.close()


def test_a_forked_child_counts_in_a_file_of_its_own(tmp_path: Path) -> None:
    counter = Counter(tmp_path, digest=A, generation=1)
    counter.record(1_000_000)
    pid = os.fork()
    if pid == 0:
        counter.record(1_000_000)
        counter.record(1_000_000)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    counter.record(1_000_000)
    found = collect(tmp_path)
    assert found.inferences == 4
    assert len(_files(tmp_path)) == 1
    counter.close()
    assert collect(tmp_path) == found


def test_a_folder_without_permission_switches_counting_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.chmod(0o555)
    # Root may write anywhere, so it becomes somebody else for this.
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        assert open_counter(tmp_path, digest=A, generation=1) is None
    finally:
        os.seteuid(before)
    assert "not counted" in caplog.text


def test_counting_that_is_not_possible_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert open_counter(tmp_path / "missing", digest=A, generation=1) is None
    assert open_counter(tmp_path / "missing", digest=A, generation=2) is None
    assert caplog.text.count("calls are not counted") == 1


@given(st.lists(st.integers(min_value=1, max_value=1 << 40), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_percentiles_are_within_a_bucket_of_the_truth(
    tmp_path_factory: pytest.TempPathFactory, latencies: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("counters")
    counter = Counter(folder, digest=A, generation=1)
    for nanoseconds in latencies:
        counter.record(nanoseconds)
    found = collect(folder)
    counter.close()
    assert len(found.buckets) == BUCKETS
    assert found.nanoseconds == sum(latencies)
    # What a device counts in a row is what anybody else finds for the same latency; sent and added it is the same.
    alone = [0] * BUCKETS
    for nanoseconds in latencies:
        alone[latency_buckets.bucket_of(nanoseconds)] += 1
    sent = latency_buckets.sparse(found.buckets)
    assert list(found.buckets) == alone == latency_buckets.merged([sent])
    assert latency_buckets.merged([sent, {"0": 1, "-1": 5, "x": 5, "999": 5, "1": -5}, sent])[1:] == [
        2 * count for count in alone[1:]
    ]
    ordered = sorted(latencies)
    for share in (0.5, 0.95, 0.99):
        # The smallest latency that at least this share does not exceed.
        rank = max(0, -int(-share * len(ordered) // 1) - 1)
        truth = min(ordered[rank], 1 << 37) / 1e6
        assert found.percentile_ms(share) <= max(truth * 1.126, 0.001024)
        assert found.percentile_ms(share) >= truth / 1.126 - 0.001024


def test_the_difference_of_two_totals_is_the_interval(tmp_path: Path) -> None:
    counter = Counter(tmp_path, digest=A, generation=1)
    for _ in range(100):
        counter.record(1_000_000)
    before = collect(tmp_path)
    for _ in range(50):
        counter.record(8_000_000)
    counter.error()
    since = collect(tmp_path) - before
    counter.close()
    assert (since.inferences, since.errors) == (50, 1)
    assert since.latency_ms()["mean"] == pytest.approx(8.0)
    assert since.latency_ms()["p50"] == pytest.approx(8.0, rel=0.13)
    assert (before - collect(tmp_path)).inferences == 0
    assert (before + since).inferences == 150

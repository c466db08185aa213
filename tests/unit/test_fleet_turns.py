"""The queue of blocks: turns between devices, bounds, and nothing sent that is not wanted any more."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kedge.fleet.fair_queue import MAX_WAITING, FairQueue, Job
from kedge_protocol.messages import BlobKind

BLOB = BlobKind.BLOB


def ask(
    turns: FairQueue,
    device: str,
    indices: list[int],
    *,
    rid: str = "r",
    boot: str = "b",
    have: int = 0,
    digest: str = "d",
) -> list[int]:
    return turns.ask(device, rid, boot, digest, BLOB, indices, have)


def taken(turns: FairQueue) -> list[Job]:
    jobs = []
    while (job := turns.take(0)) is not None:
        jobs.append(job)
    return jobs


@given(counts=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 40), min_size=1))
def test_devices_take_turns_however_much_one_asks(counts: dict[str, int]) -> None:
    turns = FairQueue()
    for device, count in counts.items():
        assert ask(turns, device, list(range(count))) == []
    order = [job.device for job in taken(turns)]
    assert Counter(order) == counts
    for position in range(len(order)):
        served = Counter(order[:position])
        waiting = [device for device in counts if served[device] < counts[device]]
        assert max(served[d] for d in waiting) - min(served[d] for d in waiting) <= 1 if waiting else True


def test_a_devices_blocks_come_in_the_order_asked() -> None:
    turns = FairQueue()
    ask(turns, "a", [5, 1, 3])
    assert [job.index for job in taken(turns)] == [5, 1, 3]


def test_a_line_is_bounded_and_says_what_found_no_room() -> None:
    turns = FairQueue()
    assert ask(turns, "a", list(range(200))) == []
    assert ask(turns, "a", list(range(200, 300))) == list(range(MAX_WAITING, 300))
    assert ask(turns, "b", [0]) == []
    assert len(taken(turns)) == MAX_WAITING + 1


def test_a_block_asked_twice_is_sent_once_under_the_newer_number() -> None:
    turns = FairQueue()
    ask(turns, "a", [1, 2], rid="old")
    ask(turns, "a", [2], rid="new")
    assert [(job.index, job.rid) for job in taken(turns)] == [(1, "old"), (2, "new")]


def test_a_block_that_came_another_way_is_not_sent_any_more() -> None:
    turns = FairQueue()
    ask(turns, "a", [1, 2, 3])
    ask(turns, "a", [9], have=1 << 2)
    ask(turns, "a", [4], have=0b1110, digest="other")
    assert [job.index for job in taken(turns)] == [1, 3, 9, 4]


def test_a_block_that_is_asked_for_though_finished_is_sent() -> None:
    turns = FairQueue()
    ask(turns, "a", [2], have=1 << 2)
    assert [job.index for job in taken(turns)] == [2]


def test_a_new_boot_empties_the_line_of_the_old_one() -> None:
    turns = FairQueue()
    ask(turns, "a", list(range(100)))
    ask(turns, "a", [7], boot="c")
    assert [job.index for job in taken(turns)] == [7]


def test_after_clear_nothing_is_left() -> None:
    turns = FairQueue()
    ask(turns, "a", [1])
    turns.clear()
    assert taken(turns) == []
    ask(turns, "a", [2])
    assert [job.index for job in taken(turns)] == [2]

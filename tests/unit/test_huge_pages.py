"""Memory that a model's weights fill is moved to huge pages, whole ones and those in use only."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from kedge_targets import huge_pages

_HUGE = 2 << 20
_EACH = _HUGE // mmap.PAGESIZE


@pytest.mark.parametrize("offset", [0, 1, _EACH - 1])
def test_whole_huge_pages_in_use_are_found_and_adjoining_ones_are_one_range(offset: int) -> None:
    start = 16 * _HUGE - offset * mmap.PAGESIZE
    resident = np.zeros(offset + 5 * _EACH + 3, bool)
    begin = offset
    for block, share in ((0, 1.0), (1, 7 / 8), (2, 0.5), (4, 1.0)):
        at = begin + block * _EACH
        resident[at : at + round(share * _EACH)] = True
    resident[-3:] = True
    assert huge_pages.full_blocks(start, resident) == [
        (16 * _HUGE, 18 * _HUGE),
        (20 * _HUGE, 21 * _HUGE),
    ]


def test_a_region_without_a_whole_huge_page_has_none() -> None:
    assert huge_pages.full_blocks(_HUGE + mmap.PAGESIZE, np.ones(_EACH - 2, bool)) == []


def test_what_was_filled_keeps_its_values() -> None:
    with huge_pages.moving():
        memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        filled = np.frombuffer(memory, np.uint64)
        filled[:] = np.arange(len(filled))
    assert np.array_equal(filled, np.arange(len(filled)))


def test_a_system_that_names_no_regions_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_MAPS", tmp_path / "maps")
    with huge_pages.moving():
        pass

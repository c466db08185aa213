"""Bad releases, drawn by seed, are stopped while they are on few devices, and taken back; good ones pass.

Fleets of seven targets whose devices lose messages, boot, lie, fall silent and have wrong clocks.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.support.simulated_releases import DEFECTS, GOOD, draw, draw_all

SEEDS = int(os.environ.get("KEDGE_SIMULATED_SEEDS", "200"))
"""Rollouts of bad releases in the campaign, and as many of good ones."""
KEPT = Path(os.environ["KEDGE_SIMULATED_RUNS"]) if "KEDGE_SIMULATED_RUNS" in os.environ else None
"""A file that keeps each run, so that the campaign may be broken off and go on."""


@pytest.mark.parametrize("kind", DEFECTS)
def test_a_bad_release_is_stopped_in_the_first_wave_and_taken_back(kind: str) -> None:
    run = draw(kind, seed=1, share=0.0, least=6, waves=("70%", "100%"))
    assert (run.found.state, run.found.wave) == ("aborted", 1), run
    assert run.is_back, run


def test_a_good_release_passes() -> None:
    run = draw(GOOD, seed=1, share=0.0, least=6, waves=("70%", "100%"))
    assert run.found.state == "done", run


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
def test_nineteen_of_twenty_bad_releases_are_stopped_in_time_on_2000_devices() -> None:
    kinds = list(DEFECTS)
    runs = draw_all([(kinds[seed % len(kinds)], seed) for seed in range(SEEDS)], KEPT)
    assert [run for run in runs if not run.is_back] == []
    for kind in kinds:
        own = [run for run in runs if run.kind == kind]
        late = [run for run in own if not run.stopped_in_time]
        assert len(late) <= 0.05 * len(own), late


@pytest.mark.campaign
@pytest.mark.timeout(24 * 3600)
def test_at_most_one_of_twenty_good_releases_is_aborted_on_2000_devices() -> None:
    runs = draw_all([(GOOD, seed) for seed in range(SEEDS)], KEPT)
    aborted = [run for run in runs if run.found.state != "done"]
    assert len(aborted) <= 0.05 * len(runs), aborted

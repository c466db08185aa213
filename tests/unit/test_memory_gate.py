"""Memory that is measured seldom: three values lie on one line by chance, and no good release is aborted for it."""

from __future__ import annotations

import random

from kedge.fleet.staged.cohorts import CohortEvidence, DeviceMemory
from kedge.fleet.staged.gates import Gates, Verdict, judge
from kedge.fleet.staged.slopes import slope

EVERY = 300.0
"""Seconds between two values."""
TARGETS = 7


def verdict(devices: list[DeviceMemory]) -> Verdict:
    count = len(devices)
    cohort = CohortEvidence(target="t0", devices=count, serving=count, memory_slope=tuple(devices))
    others = [CohortEvidence(target=f"t{number}") for number in range(1, TARGETS)]
    found = {result.gate: result.verdict for result in judge(Gates(), [cohort, *others], soaked=False)}
    return found["memory_per_minute"]


def outcome(seed: int, *, noise: float, leak: float = 0.0, devices: int = 7, values: int = 8) -> tuple[Verdict, int]:
    """Return how a cohort ends that is looked at with each value that comes, and after how many of them."""
    draw = random.Random(seed)
    points: list[list[tuple[float, float]]] = [[] for _ in range(devices)]
    known: dict[int, DeviceMemory] = {}
    for number in range(1, values + 1):
        for device in draw.sample(range(devices), devices):
            points[device].append((number * EVERY, 1e8 + number * EVERY / 60 * leak + draw.gauss(0, noise)))
            if len(points[device]) < 3:
                continue
            new, variance = slope(points[device])
            known[device] = DeviceMemory(device=str(device), new=new, variance=variance, points=len(points[device]))
            found = verdict(list(known.values()))
            if found is not Verdict.UNDECIDED:
                return found, number
    return Verdict.UNDECIDED, values


def test_two_devices_whose_three_values_lie_on_a_line_by_chance_abort_nothing() -> None:
    """As they came in a simulated fleet of 2000 whose memory only scattered, by 1 MiB."""
    told = [
        [(308.8, 124068628.0), (621.9, 126507501.0), (914.0, 128869087.0)],
        [(300.0, 124076537.0), (600.0, 126350214.0), (900.0, 127843350.0)],
    ]
    slopes = [slope(points) for points in told]
    assert [variance < 5e9 for _, variance in slopes] == [True, True], "far less than they scatter by"
    devices = [DeviceMemory(device=str(n), new=one[0], variance=one[1], points=3) for n, one in enumerate(slopes)]
    assert verdict(devices) is Verdict.UNDECIDED


def test_memory_that_only_scatters_fails_no_more_often_than_the_gate_allows() -> None:
    """Its share of the false aborts is 0.05 of 7 targets and 11 gates: 0.4 of these 600."""
    ends = [outcome(seed, noise=4e6)[0] for seed in range(600)]
    assert ends.count(Verdict.FAIL) <= 1
    assert ends.count(Verdict.PASS) >= 570


def test_a_leak_of_a_megabyte_a_minute_is_found_by_the_fourth_value_however_much_memory_scatters() -> None:
    for noise in (0.0, 2e5, 1e6):
        ends = [outcome(seed, noise=noise, leak=1e6) for seed in range(50)]
        assert {found for found, _ in ends} == {Verdict.FAIL}, noise
        assert max(number for _, number in ends) <= 4, noise

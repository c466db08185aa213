"""The plan of waves and the selectors, over drawn fleets."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from kedge.fleet.staged import selectors, waves
from kedge.fleet.staged.selectors import Properties
from kedge_protocol.errors import ConfigError, FleetError

TARGETS = ("rpi4", "rpi5", "jetson-orin-nx", "generic-cpu")
FLEETS = st.dictionaries(st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True), st.sampled_from(TARGETS), max_size=120)
SHARES = st.lists(st.integers(1, 99), unique=True, max_size=5).map(lambda some: [f"{one}%" for one in sorted(some)])
COUNTS = st.lists(st.integers(1, 200), unique=True, max_size=5).map(lambda some: [str(one) for one in sorted(some)])
SIZES = st.one_of(SHARES, COUNTS).map(lambda some: [waves.parse_size(one) for one in [*some, "100%"]])


@given(FLEETS, SIZES, st.integers(0, 12), st.randoms(use_true_random=False))
def test_every_device_is_in_one_wave_whatever_the_order(
    fleet: dict[str, str], sizes: list[waves.Size], least: int, order: random.Random
) -> None:
    found = waves.plan(fleet, sizes, min_per_target=least)
    named = [name for wave in found.waves for name in wave]
    assert Counter(named) == Counter(list(fleet))
    assert all(wave[name] == fleet[name] for wave in found.waves for name in wave)
    assert all(found.waves)
    shuffled = list(fleet.items())
    order.shuffle(shuffled)
    again = waves.plan(dict(shuffled), sizes, min_per_target=least)
    assert [list(wave.items()) for wave in again.waves] == [list(wave.items()) for wave in found.waves]
    assert again.shortfalls == found.shortfalls


@given(FLEETS, SIZES, st.integers(0, 12))
def test_each_wave_holds_enough_of_each_target_or_says_that_it_cannot(
    fleet: dict[str, str], sizes: list[waves.Size], least: int
) -> None:
    found = waves.plan(fleet, sizes, min_per_target=least)
    short = {(one.wave, one.target): one.devices for one in found.shortfalls}
    left = Counter(fleet.values())
    for number, wave in enumerate(found.waves, 1):
        there = Counter(wave.values())
        for target in set(fleet.values()):
            held = there[target]
            assert held >= least or short[number, target] == held == left[target]
            assert held < least or (number, target) not in short
            left[target] -= held
    # No wave runs ahead of its size by more than what each target must have.
    reached = 0
    for wave, size in zip(found.waves, sizes, strict=False):
        reached += len(wave)
        strata = len(set(fleet.values()))
        if len(found.waves) == len(sizes):
            assert reached <= size.of(len(fleet)) * len(fleet) + strata * (1 + least * len(sizes))


@given(FLEETS, SIZES)
def test_a_wave_takes_its_share_of_each_target(fleet: dict[str, str], sizes: list[waves.Size]) -> None:
    found = waves.plan(fleet, sizes, min_per_target=0)
    if len(found.waves) != len(sizes):
        return
    totals, reached = Counter(fleet.values()), Counter[str]()
    for wave, size in zip(found.waves, sizes, strict=True):
        reached.update(wave.values())
        for target, total in totals.items():
            assert abs(reached[target] - float(size.of(len(fleet))) * total) <= 1


@given(FLEETS)
def test_a_hash_share_is_the_same_for_a_device_in_any_fleet(fleet: dict[str, str]) -> None:
    tenth, half = selectors.parse("hash<10%"), selectors.parse("hash<50%")
    rest = selectors.parse("hash>=50%")
    for name in fleet:
        device = Properties(name=name)
        assert tenth.matches(device) <= half.matches(device)
        assert half.matches(device) != rest.matches(device)


def test_hash_shares_are_what_they_say() -> None:
    half = selectors.parse("hash<50%")
    assert abs(sum(half.matches(Properties(name=f"d{number}")) for number in range(4000)) - 2000) < 150


DEVICE = Properties(
    name="cam-1",
    labels={"site": "berlin", "floor": "3", "target": "shelf"},
    facts={"target": "rpi4", "online": "yes", "agent": "0.10.1", "runtime.onnxruntime": "1.20.1+cpu"},
)


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("", True),
        ("site=berlin", True),
        ("site = paris", False),
        ("site!=paris,target in (rpi4, rpi5)", True),
        ("target not in (rpi4)", False),
        ("label.target=shelf,target=rpi4", True),
        ("agent>=0.3", True),
        ("agent>=0.10.1,agent<=0.10.1", True),
        ("agent>0.10.1", False),
        ("agent>0.10.1rc1", True),
        ("agent<0.11.dev3", True),
        ("runtime.onnxruntime>=1.20.1", True),
        ("runtime.tflite>=1", False),
        ("floor", True),
        ("!floor", False),
        ("!room,name in (cam-1,cam-2),online=yes", True),
        ("room!=3", True),
    ],
)
def test_selectors_ask_for_labels_and_facts(text: str, holds: bool) -> None:
    assert selectors.parse(text).matches(DEVICE) is holds


VERSIONS = st.from_regex(r"[0-3](\.[0-3]){0,3}((a|b|rc)[0-2])?(\.dev[0-2])?", fullmatch=True)


@given(VERSIONS, VERSIONS)
def test_versions_compare_as_python_packages_do(reported: str, asked: str) -> None:
    device = Properties(name="d", facts={"agent": reported})
    for operation, holds in (
        ("<", Version(reported) < Version(asked)),
        ("<=", Version(reported) <= Version(asked)),
        (">", Version(reported) > Version(asked)),
        (">=", Version(reported) >= Version(asked)),
    ):
        assert selectors.parse(f"agent{operation}{asked}").matches(device) is holds, operation


@pytest.mark.parametrize(
    "text", ["site=", "=x", "target in ()", "hash=10%", "hash<10", "hash<200%", "a b", "site=a,,b=c"]
)
def test_a_selector_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="selector's term"):
        selectors.parse(text)


def test_a_label_that_no_device_has_is_refused_with_what_was_meant() -> None:
    with pytest.raises(FleetError, match=r"no device has a label 'sites'.*Did you mean 'site'"):
        selectors.parse("sites=berlin").check_keys([DEVICE])

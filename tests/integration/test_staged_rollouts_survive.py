"""A controller that is killed with SIGKILL, at any statement and in any phase of a rollout, and goes on."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from tests.support.killed import abort, is_killed, tick
from tests.support.staged_fleet import StagedFleet, layouts

from kedge.fleet.staged.policy import Policy

POLICY = Policy(waves=("2", "100%"), min_per_target=1, soak=30.0, progress_timeout=60.0, retries=1, retry_after=10.0)
FEW_STATEMENTS, MANY_STATEMENTS = (1, 5), (6, 60)
"""Every round has the few, and one that decides something the many."""


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return layouts(tmp_path_factory.mktemp("layouts"), ("rpi4",))


class KilledFleet(StagedFleet):
    """Each round's controller is killed before a drawn statement, and comes back."""

    def begin(self, seed: int, *, kills: bool) -> None:
        self.random, self.kills = random.Random(seed), kills
        self.killed: Counter[str] = Counter()

    def tick(self) -> None:
        for least, most in (FEW_STATEMENTS, MANY_STATEMENTS) if self.kills else ():
            phase = self.stage().phase.value
            if is_killed(self.service.state, self.now, self.random.randint(least, most), tick, self.now):
                self.killed[phase] += 1
        super().tick()


def story(folder: Path, published: dict[str, Path], seed: int, *, kills: bool, bad: bool) -> KilledFleet:
    fleet = KilledFleet(folder, published)
    fleet.begin(seed, kills=False)
    fleet.add(8, "rpi4")
    fleet.settle("1.0")
    fleet.fail("2.0", ["rpi4-0003"], "fetch", "ok")
    if bad:
        # The first wave holds; what comes after it does not.
        first = fleet.service.rollout_plan("tiny:2.0", policy=POLICY).waves[0].devices["rpi4"]
        fleet.fail("2.0", set(fleet.devices) - set(first), "prove")
    fleet.begin(seed, kills=kills)
    fleet.service.rollout_start("tiny:2.0", policy=POLICY)
    fleet.until("done", "aborted", every=10)
    fleet.kills = False
    fleet.step(60, every=10)
    return fleet


@pytest.mark.parametrize(("seed", "bad"), [(1, False), (2, True)])
def test_a_controller_killed_in_every_round_tells_each_device_each_step_once(
    tmp_path: Path, published: dict[str, Path], seed: int, bad: bool
) -> None:
    with (
        story(tmp_path / "whole", published, seed, kills=False, bad=bad) as whole,
        story(tmp_path / "killed", published, seed, kills=True, bad=bad) as killed,
    ):
        assert set(killed.killed) >= {"scheduled", "running", "soaking"} | ({"reverting"} if bad else set())
        assert killed.serving("1.0" if bad else "2.0") == set(killed.devices)
        for name, device in killed.devices.items():
            assert [digest for _, digest in device.told] == [digest for _, digest in whole.devices[name].told]
        number = whole.status().id
        assert killed.actions(2) == whole.actions(2)
        assert killed.stage().steps == whole.stage().steps
        assert killed.status().id == number
        killed.service.audit_verify()


def test_an_order_that_is_killed_at_any_statement_has_happened_whole_or_not_at_all(
    tmp_path: Path, published: dict[str, Path]
) -> None:
    with KilledFleet(tmp_path, published) as fleet:
        fleet.begin(0, kills=False)
        fleet.add(4, "rpi4")
        fleet.settle("1.0")
        fleet.service.rollout_start("tiny:2.0", policy=POLICY)
        fleet.step(3)
        before = fleet.service.audit_log()
        statement = 1
        while is_killed(fleet.service.state, fleet.now, statement, abort):
            statement += 1
            if fleet.stage(2).phase.value != "soaking":
                break
            assert (len(fleet.service.rollouts()), fleet.service.audit_log()) == (2, before)
        assert statement > 15
        assert fleet.stage(2).phase.value == "reverting"
        fleet.until("aborted", rollout=2)
        assert fleet.serving("1.0") == set(fleet.devices)
        assert {len(device.told) for device in fleet.devices.values()} == {0, 2}

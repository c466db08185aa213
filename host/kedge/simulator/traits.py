"""What is particular about each device of a simulated fleet, drawn by the seed."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

from kedge.simulator.lies import Lie
from kedge.simulator.scenario import Group, Scenario

ROOM = 8 << 30
"""Free bytes of a device's disk."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One device.

    Attributes:
        seed: of what it draws itself.
        slow: factor of everything that it does.
        lie: how it lies; None if it does not.
        silent: whether it is never heard of again once it is told of the new release.
        cut: whether it is in the part that a partition cuts off.
        free_bytes: of its disk.
        skew: seconds by which its clock is wrong at most.
        clock_steps: seconds between two steps of its clock; 0 for none.
        clock_lost: whether its clock begins in 1970 with each boot.
    """

    name: str
    target: str
    labels: dict[str, str]
    seed: str
    slow: float = 1.0
    lie: Lie | None = None
    silent: bool = False
    cut: bool = False
    free_bytes: int = ROOM
    skew: float = 0.0
    clock_steps: float = 0.0
    clock_lost: bool = False

    def clock_error(self, now: float) -> float:
        """Return by how many seconds its clock is wrong at a time of the simulation."""
        step = f" {int(now / self.clock_steps)}" if self.clock_steps else ""
        return _place(f"{self.seed} skew{step}") * self.skew if self.skew else 0.0


@functools.lru_cache(maxsize=1 << 14)
def _place(seed: str) -> float:
    return random.Random(seed).uniform(-1, 1)


def draw(scenario: Scenario) -> list[Traits]:
    """Return all devices of a scenario, in the order of its groups."""
    counted = dict.fromkeys(scenario.targets, 0)
    found = []
    for group in scenario.fleet:
        for _ in range(group.count):
            counted[group.target] += 1
            found.append(_one(scenario, group, f"{group.target}-{counted[group.target]:05d}"))
    return found


def _one(scenario: Scenario, group: Group, name: str) -> Traits:
    faults, seed = scenario.faults, f"{scenario.seed} {name}"
    # Each fault has draws of its own: another share of one leaves the others as they are.
    hits = {
        kind: random.Random(f"{seed} {kind}").random() < getattr(faults, kind)
        for kind in ("disk_full", "slow", "lying", "silent", "clock_lost")
    }
    cut = random.Random(f"{seed} cut").random() < (faults.partition.share if faults.partition else 0.0)
    return Traits(
        name=name,
        target=group.target,
        labels=group.labels,
        seed=seed,
        slow=faults.slow_factor if hits["slow"] else 1.0,
        lie=random.Random(f"{seed} lie").choice(faults.lies) if hits["lying"] else None,
        silent=hits["silent"],
        cut=cut,
        free_bytes=scenario.new.size // 2 if hits["disk_full"] else ROOM,
        skew=faults.clock_skew,
        clock_steps=86400.0 / faults.clock_steps_per_day if faults.clock_steps_per_day else 0.0,
        clock_lost=hits["clock_lost"],
    )

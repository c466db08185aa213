"""What is particular about each device of a simulated fleet, drawn by the seed."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kedge.simulator.scenario import Group, Scenario

ROOM = 8 << 30
"""Free bytes of a device's disk."""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """One device.

    Attributes:
        seed: of what it draws itself.
        slow: factor of everything that it does.
        lying: whether it claims what it does not do.
        silent: whether it is never heard of again once it is told of the new release.
        cut: whether it is in the part that a partition cuts off.
        free_bytes: of its disk.
        skew: seconds by which its clock is wrong.
    """

    name: str
    target: str
    labels: dict[str, str]
    seed: str
    slow: float = 1.0
    lying: bool = False
    silent: bool = False
    cut: bool = False
    free_bytes: int = ROOM
    skew: float = 0.0


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
        for kind in ("disk_full", "slow", "lying", "silent")
    }
    cut = random.Random(f"{seed} cut").random() < (faults.partition.share if faults.partition else 0.0)
    return Traits(
        name=name,
        target=group.target,
        labels=group.labels,
        seed=seed,
        slow=faults.slow_factor if hits["slow"] else 1.0,
        lying=hits["lying"],
        silent=hits["silent"],
        cut=cut,
        free_bytes=scenario.new.size // 2 if hits["disk_full"] else ROOM,
        skew=random.Random(f"{seed} skew").uniform(-1, 1) * faults.clock_skew,
    )

"""Releases drawn by seed for a simulated fleet of seven targets: good ones, and bad ones of five kinds."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kedge.simulator import scenario as scenarios
from kedge.simulator.result import SimulationResult
from kedge.simulator.virtual import simulate

FLEET = {
    "rpi4": 700,
    "rpi5": 400,
    "jetson-orin-nano": 300,
    "generic-cpu": 250,
    "intel-cpu": 200,
    "kria-kv260": 100,
    "ncs2": 50,
}
"""Target → devices: 2000."""
NOISE = {
    "loss": 0.01,
    "jitter": 0.5,
    "reboots_per_day": 1.0,
    "clock_skew": 7200.0,
    "slow": 0.02,
    "disk_full": 0.002,
    "lying": 0.002,
    "silent": 0.002,
}
POLICY = {"soak": "20m"}
"""Otherwise the defaults: waves of 1 %, 10 %, 50 % and 100 %, 5 devices of each target at least. A wrong class is
looked for in shadow, and so is every other good release."""
GOOD = "good"
DEFECTS: dict[str, dict[str, Any]] = {
    "golden": {"golden_vectors": True},
    "errors": {"errors": 0.08},
    "latency": {"latency": 1.5},
    "leak": {"leak_mb_per_minute": 1.0},
    "class": {"wrong_class": 3},
}
"""Kind → what is wrong, on one target that the seed draws; a leak and a wrong class are on all."""
EVERYWHERE = ("leak", "class")


@dataclass(frozen=True)
class Run:
    """One simulated rollout."""

    kind: str
    seed: int
    found: SimulationResult

    @property
    def is_back(self) -> bool:
        """Whether everything that it reached runs the old release again."""
        return self.found.reverted == self.found.reached

    @property
    def stopped_in_time(self) -> bool:
        """Whether a bad release was stopped: what is everywhere before a tenth of the fleet, else in the first wave."""
        if self.found.state != "aborted":
            return False
        return self.found.reached < 0.1 * self.found.total if self.kind in EVERYWHERE else self.found.wave == 1


def draw(kind: str, seed: int, *, share: float = 1.0, least: int = 7, waves: tuple[str, ...] = ()) -> Run:
    """Simulate a rollout of a release of this kind.

    Args:
        share: of the fleet's 2000 devices.
        least: devices of each target at least.
        waves: other than the policy's default.
    """
    defect = DEFECTS.get(kind)
    if defect is not None and kind not in EVERYWHERE:
        defect = {**defect, "targets": [random.Random(f"{kind} {seed}").choice(list(FLEET))]}
    policy: dict[str, Any] = {**POLICY, **({"waves": list(waves)} if waves else {})}
    if kind == "class" or (kind == GOOD and seed % 2 == 0):
        policy["shadow"] = 0.2
    document = {
        "seed": seed,
        "fleet": [{"target": name, "count": max(least, round(count * share))} for name, count in FLEET.items()],
        "new": {"version": "2.0", "defects": [] if defect is None else [defect]},
        "faults": NOISE,
        "telemetry": 300,
        "tick": 60,
        "limit": 8 * 3600,
        "rollout": policy,
    }
    return Run(kind, seed, simulate(scenarios.parse(document)))


def draw_all(wanted: Sequence[tuple[str, int]], kept: Path | None = None) -> list[Run]:
    """Simulate a rollout for each kind and seed, in as many processes as there are processors.

    Args:
        kept: a file to which each run is appended when it ends, a line of JSON; runs that it holds already are not
            made again, so that hours of them may be broken off. Delete it when the code under test has changed.
    """
    done = {(run.kind, run.seed): run for run in _read(kept)}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        under_way = [pool.submit(draw, kind, seed) for kind, seed in wanted if (kind, seed) not in done]
        for future in as_completed(under_way):
            run = future.result()
            done[run.kind, run.seed] = run
            if kept is not None:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(run)) + "\n")
    return [done[one] for one in wanted]


def _read(kept: Path | None) -> list[Run]:
    if kept is None or not kept.exists():
        return []
    rows = [json.loads(line) for line in kept.read_text(encoding="utf-8").splitlines()]
    return [Run(row["kind"], row["seed"], SimulationResult(**row["found"])) for row in rows]

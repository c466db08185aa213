"""First waves drawn at random, with all figures that gates judge: five devices of each of seven targets, minute by
minute, on noisy devices.

What is noise is noise before the switch too: devices differ in errors, speed and warmth, errors come in bursts, latency
wanders over minutes and differs between two hours, memory walks, and a device in two hundred goes bad by itself.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from kedge.fleet.staged.cohorts import (
    CallFigures,
    CohortEvidence,
    DeviceCalls,
    DeviceMemory,
    DeviceTemperature,
    Spread,
)
from kedge.fleet.staged.gates import Gates, Verdict, judge
from kedge.fleet.staged.slopes import MIN_SECONDS, WARM_UP_SECONDS, slope

TARGETS, DEVICES = 7, 5
MINUTES, SOAK, BEFORE = 60, 30, 120
CALLS = 30
"""Of a device a minute."""
FAULTY = 0.005


@dataclass(frozen=True, kw_only=True)
class Release:
    """What a release does to the devices of the first target."""

    errors: float = 0.0
    p99: float = 1.0
    leak: float = 0.0
    refused: bool = False


GOOD = Release()
RELEASES: Mapping[str, Release] = {
    "a good release": GOOD,
    "golden vectors fail on one target": Release(refused=True),
    "8 % of the calls fail on one target": Release(errors=0.08),
    "p99 × 1.5 on one target": Release(p99=1.5),
    "1 MB a minute leaks on one target": Release(leak=1e6),
}


class Device:
    """One device with its habits."""

    def __init__(self, draw: random.Random, name: str, release: Release) -> None:
        self.name = name
        self._draw = draw
        self._rate = draw.betavariate(0.005 * 200, 0.995 * 200)
        self._speed = math.log(20) + draw.gauss(0, 0.4)
        self._warmth = draw.gauss(62, 8)
        self._wander = 0.0
        self._bytes = 2e8
        self.old = self._past()
        faulty = draw.random() < FAULTY
        self._fault = draw.choice(("errors", "p99", "leak")) if faulty else ""
        self._release = release
        self._speed += draw.gauss(0, 0.05)
        self.refuses = release.refused or draw.random() < 0.0005
        self.new = DeviceCalls(device=name)
        self._points: list[tuple[float, float]] = []
        self._warm = Spread()
        self._minute = 0

    def _past(self) -> DeviceCalls:
        past = DeviceCalls(device=self.name)
        for _ in range(BEFORE):
            past = self._with_minute(past, self._rate, 0.0)
        return past

    def _with_minute(self, calls: DeviceCalls, rate: float, slower: float) -> DeviceCalls:
        draw = self._draw
        self._wander = 0.8 * self._wander + draw.gauss(0, 0.04)
        now = min(0.95, draw.betavariate(max(rate, 1e-6) * 40, (1 - rate) * 40))
        bad = sum(draw.random() < now for _ in range(CALLS))
        at = self._speed + self._wander
        return dataclasses.replace(
            calls,
            calls=calls.calls.with_block(CALLS, bad),
            p95=calls.p95.with_value(at + 0.3 + draw.gauss(0, 0.08)),
            p99=calls.p99.with_value(at + 0.6 + slower + draw.gauss(0, 0.2)),
        )

    def pass_minute(self) -> None:
        """One more minute with the new bundle."""
        rate = min(0.9, self._rate + self._release.errors + 0.3 * (self._fault == "errors"))
        slower = math.log(self._release.p99) + (self._fault == "p99")
        self.new = self._with_minute(self.new, rate, slower)
        self._bytes += self._draw.gauss(0, 2e5) + self._release.leak + 2e6 * (self._fault == "leak")
        self._points.append((60.0 * self._minute, self._bytes + self._draw.gauss(0, 3e5)))
        self._warm = self._warm.with_value(self._warmth + 3 + self._draw.gauss(0, 2))
        self._minute += 1

    def memory(self) -> DeviceMemory:
        """The growth so far."""
        points = [point for point in self._points if point[0] >= WARM_UP_SECONDS]
        long = points and points[-1][0] - points[0][0] >= MIN_SECONDS
        new, variance = slope(points) if long else (None, 0.0)
        return DeviceMemory(device=self.name, new=new, variance=variance, points=len(points))

    def temperature(self) -> DeviceTemperature:
        """Before and after."""
        return DeviceTemperature(device=self.name, new=self._warm.mean, old=self._warmth)


def cohort(target: str, devices: list[Device]) -> CohortEvidence:
    """The evidence of one target."""
    proved = [device for device in devices if not device.refuses]
    return CohortEvidence(
        target=target,
        devices=len(devices),
        serving=len(proved),
        failed=len(devices) - len(proved),
        proof_failed=len(devices) - len(proved),
        served_by_calls=len(proved),
        served_by_golden=0,
        new=CallFigures(devices=tuple(device.new for device in proved)),
        old=CallFigures(devices=tuple(device.old for device in devices)),
        memory_slope=tuple(device.memory() for device in proved),
        temperature_c=tuple(device.temperature() for device in proved),
    )


@dataclass(frozen=True)
class Ends:
    """How rollouts ended: those that were aborted, by which gates, and after how many minutes."""

    rollouts: int
    minutes: tuple[int, ...]
    gates: tuple[str, ...]
    promoted: int

    @property
    def aborted(self) -> float:
        """Share of the rollouts."""
        return len(self.minutes) / self.rollouts

    @property
    def median(self) -> float:
        """Minutes until the abort; NaN without any."""
        return statistics.median(self.minutes) if self.minutes else math.nan


def play(seed: int, rollouts: int, release: Release, gates: Gates | None = None) -> Ends:
    """Let rollouts go through their first wave, with a look at all gates each minute."""
    minutes, failed, promoted = [], [], 0
    for number in range(rollouts):
        draw = random.Random(seed * 1_000_003 + number)
        fleet = {
            f"t{target}": [Device(draw, f"t{target}-{one}", GOOD if target else release) for one in range(DEVICES)]
            for target in range(TARGETS)
        }
        end, gate = _play(fleet, gates or Gates())
        if gate is not None:
            minutes.append(end)
            failed.append(gate)
        promoted += gate is None and end < MINUTES
    return Ends(rollouts, tuple(minutes), tuple(failed), promoted)


def _play(fleet: Mapping[str, list[Device]], gates: Gates) -> tuple[int, str | None]:
    for minute in range(1, MINUTES + 1):
        for devices in fleet.values():
            for device in devices:
                device.pass_minute()
        found = judge(gates, [cohort(target, some) for target, some in fleet.items()], soaked=minute >= SOAK)
        if failing := [result.gate for result in found if result.verdict is Verdict.FAIL]:
            return minute, failing[0]
        if minute >= SOAK and all(result.verdict is Verdict.PASS for result in found):
            return minute, None
    return MINUTES, None

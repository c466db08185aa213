"""What a simulated fleet is, whatever its time: devices, faults, the log, and the outcome."""

from __future__ import annotations

import abc
import hashlib
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import numpy as np

from kedge.simulator import traits as all_traits
from kedge.simulator.clock import Timer
from kedge.simulator.device import SimulatedDevice
from kedge.simulator.outcome import Outcome
from kedge.simulator.prepared import prepare
from kedge.simulator.result import ControllerCost, SimulationResult
from kedge.simulator.scenario import Scenario
from kedge.simulator.traits import Traits
from kedge_protocol.broker import Broker
from kedge_protocol.channel import Channel
from kedge_protocol.trust import Trust

START_SECONDS = 60.0
"""The devices come to the broker within this time."""


class SimulatedFleet(abc.ABC):
    """A simulated fleet before its rollout; the world of its devices, see :class:`kedge.simulator.surroundings.World`.

    Args:
        scenario: what to simulate.
        state: an empty folder for the fleet's state.
        broker: where the devices connect.
        log: written to, a line for each event; None for none.
    """

    def __init__(self, scenario: Scenario, state: Path, broker: Broker, *, log: TextIO | None = None) -> None:
        self.scenario = scenario
        self.noise = np.random.default_rng(scenario.seed)
        self.broker = broker
        self.cut: set[str] = set()
        """Devices that have no network at present."""
        self._log = log
        self._hash = hashlib.sha256()
        drawn = all_traits.draw(scenario)
        self._prepared = prepare(scenario, drawn, state, self.wall)
        self.devices = [SimulatedDevice(self, one) for one in drawn]
        for device in self.devices:
            old, desired = self._prepared.old[device.traits.target], self._prepared.desired[device.traits.name]
            device.install(old, self._prepared.maps, desired)

    @property
    def run_id(self) -> str:
        """In each boot id; empty in virtual time, where equal scenarios are equal."""
        return ""

    @property
    def trust(self) -> Trust:
        """The keys of the devices' kits."""
        return self._prepared.trust

    @abc.abstractmethod
    def steady(self) -> float:
        """Return seconds of a monotonic clock."""

    @abc.abstractmethod
    def wall(self) -> float:
        """Return seconds since 1970."""

    @abc.abstractmethod
    def later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function after so many seconds."""

    @abc.abstractmethod
    def connect(self, traits: Traits) -> Callable[..., Channel]:
        """Return what makes a device's connection."""

    @abc.abstractmethod
    def lose(self, traits: Traits, connection: Channel, *, for_ever: bool) -> None:
        """Cut a device's connection."""

    def note(self, device: str, what: str, detail: str) -> None:
        """Write a line of the log."""
        line = f"{self.steady():.3f} {device} {what} {detail}".rstrip() + "\n"
        self._hash.update(line.encode())
        if self._log is not None:
            self._log.write(line)

    def plan_starts(self, within: float) -> None:
        """Switch all devices on, within so many seconds."""
        chance = random.Random(f"{self.scenario.seed} start")
        for device in self.devices:
            self.later(chance.uniform(0.0, within), device.start)

    def plan_faults(self) -> None:
        """Let the faults come that the scenario tells of, from now on."""
        faults, chance = self.scenario.faults, random.Random(f"{self.scenario.seed} faults")
        if faults.reboots_per_day:
            for device in self.devices:
                self._plan_reboot(device, chance)
        if faults.partition is not None:
            cut = [device for device in self.devices if device.traits.cut]
            self.later(faults.partition.after, lambda: self._cut(cut))
            self.later(faults.partition.after + faults.partition.seconds, lambda: self._mend(cut))

    def _plan_reboot(self, device: SimulatedDevice, chance: random.Random) -> None:
        def reboot() -> None:
            device.reboot()
            self._plan_reboot(device, chance)

        self.later(chance.expovariate(self.scenario.faults.reboots_per_day / 86400.0), reboot)

    def _cut(self, devices: list[SimulatedDevice]) -> None:
        self.note("-", "partition", f"{len(devices)} devices")
        self.cut |= {device.traits.name for device in devices}
        for device in devices:
            device.lose_network()

    def _mend(self, devices: list[SimulatedDevice]) -> None:
        self.note("-", "mended", f"{len(devices)} devices")
        self.cut -= {device.traits.name for device in devices}

    def result(
        self, outcome: Outcome, seconds: float, messages: int, size: int, controller: ControllerCost | None = None
    ) -> SimulationResult:
        """Return what became of the rollout.

        Args:
            seconds: since its start.
            messages, size: what clients sent to the broker, and its bytes.
            controller: its cost, where it is known.
        """
        new = {bundle.digest: bundle.config.backend for bundle in self._prepared.new}
        old = {bundle.digest for bundle in self._prepared.old.values()}
        reached = [device for device in self.devices if device.reached & new.keys()]
        serving = Counter(new[device.running] for device in self.devices if device.running in new)
        return SimulationResult(
            state=outcome.state,
            total=len(self.devices),
            reached=len(reached),
            reverted=sum(device.running in old for device in reached),
            failed=sum(bool(device.refused & new.keys()) for device in self.devices),
            backends={} if len(self.scenario.new.backends) < 2 else dict(sorted(serving.items())),
            measured=sum(device.measured for device in self.devices),
            wave=outcome.wave,
            reason=outcome.reason,
            seconds=seconds,
            messages=messages,
            bytes=size,
            log=self._hash.hexdigest(),
            controller=controller,
        )

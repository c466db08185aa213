"""Runs a scenario in virtual time: simulated devices, and the real controller on the real database."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np

from kedge.fleet.controller import TICK_SECONDS, Controller
from kedge.fleet.service import FleetService
from kedge.simulator import traits as all_traits
from kedge.simulator.bus import Bus, Line, VirtualConnection
from kedge.simulator.clock import Timer, VirtualClock
from kedge.simulator.device import SimulatedDevice
from kedge.simulator.outcome import Outcome, Rollout
from kedge.simulator.prepared import Prepared, prepare
from kedge.simulator.result import SimulationResult
from kedge.simulator.scenario import MODEL, Scenario
from kedge.simulator.traits import Traits
from kedge_protocol.broker import Broker
from kedge_protocol.channel import Channel
from kedge_protocol.trust import Trust

BROKER = Broker(host="simulated", port=1883)
_START_SECONDS = 60.0
"""The devices come to the broker within this time."""


class VirtualWorld:
    """A simulation in virtual time; see :class:`kedge.simulator.device.World`.

    Args:
        scenario: what to simulate.
        state: an empty folder for the fleet's state.
        log: written to, a line for each event; None for none.
    """

    def __init__(self, scenario: Scenario, state: Path, *, log: TextIO | None = None) -> None:
        self.scenario = scenario
        self.clock = VirtualClock()
        self.noise = np.random.default_rng(scenario.seed)
        self.broker = BROKER
        self.bus = Bus(self.clock, random.Random(f"{scenario.seed} network"))
        self._log = log
        self._hash = hashlib.sha256()
        drawn = all_traits.draw(scenario)
        self._prepared: Prepared = prepare(scenario, drawn, state, self.clock.wall)
        self._lines: dict[str, Line] = {one.name: self._line(one) for one in drawn}
        self.devices = [SimulatedDevice(self, one) for one in drawn]
        for device in self.devices:
            target = device.traits.target
            desired = self._prepared.desired[device.traits.name]
            device.install(self._prepared.old[target], self._prepared.maps, desired)
        self.controller = Controller(
            state,
            BROKER,
            clock=self.clock.wall,
            steady=self.clock.steady,
            connect=partial(_Hearing, self._controller_heard, self.bus, Line()),
            block_thread=False,
        )
        self._due: Timer | None = None

    @property
    def trust(self) -> Trust:
        """The keys of the devices' kits."""
        return self._prepared.trust

    def steady(self) -> float:
        """Return the seconds since the simulation's start."""
        return self.clock.now

    def wall(self) -> float:
        """Return the seconds since 1970."""
        return self.clock.wall()

    def later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function after so many seconds."""
        return self.clock.later(seconds, function)

    def connect(self, traits: Traits) -> Callable[..., Channel]:
        """Return what makes a device's connection."""
        return partial(VirtualConnection, self.bus, self._lines[traits.name])

    def lose(self, traits: Traits, connection: Channel, *, for_ever: bool) -> None:
        """Cut a device's connection."""
        if isinstance(connection, VirtualConnection):
            connection.lose(back=not for_ever)

    def note(self, device: str, what: str, detail: str) -> None:
        """Write a line of the log."""
        line = f"{self.clock.now:.3f} {device} {what} {detail}".rstrip() + "\n"
        self._hash.update(line.encode())
        if self._log is not None:
            self._log.write(line)

    def _line(self, one: Traits) -> Line:
        faults = self.scenario.faults
        return Line(faults.loss, faults.latency * one.slow, faults.jitter * one.slow)

    # The controller.

    def _controller_heard(self, topic: str) -> None:
        # Telemetry asks for no answer: the next regular round takes it.
        if "/tele/" not in topic:
            self._tick_within(TICK_SECONDS)

    def _tick_within(self, seconds: float) -> None:
        if self._due is None:
            self._due = self.clock.later(seconds, self._tick)

    def _tick(self) -> None:
        self._due = None
        self.controller.tick()

    def _regular_tick(self) -> None:
        self.controller.tick()
        self.clock.later(self.scenario.tick, self._regular_tick)

    # The run.

    def run(self, rollout: Rollout) -> SimulationResult:
        """Run the scenario to its end."""
        scenario, clock = self.scenario, self.clock
        chance = random.Random(f"{scenario.seed} start")
        self.controller.start()
        for device in self.devices:
            clock.later(chance.uniform(0.0, _START_SECONDS), device.start)
        self._regular_tick()
        clock.run(scenario.before, lambda: False)
        began = clock.now
        rollout.start()
        self.note("-", "rollout", scenario.new.version)
        self._tick_within(0.0)
        self._plan_faults()
        outcome: list[Outcome] = []
        clock.later(scenario.tick, lambda: self._watch(rollout, outcome))
        clock.run(began + scenario.limit, lambda: bool(outcome))
        self.note("-", "end", outcome[0].state if outcome else "unfinished")
        return self._result(outcome[0] if outcome else Outcome(state="unfinished"), clock.now - began)

    def _watch(self, rollout: Rollout, outcome: list[Outcome]) -> None:
        ended = rollout.ended()
        if ended is None:
            self.clock.later(self.scenario.tick, lambda: self._watch(rollout, outcome))
        else:
            outcome.append(ended)

    def _plan_faults(self) -> None:
        faults, chance = self.scenario.faults, random.Random(f"{self.scenario.seed} faults")
        if faults.reboots_per_day:
            for device in self.devices:
                self._plan_reboot(device, chance)
        if faults.partition is not None:
            cut = [device for device in self.devices if device.traits.cut]
            self.clock.later(faults.partition.after, lambda: self._cut(cut))
            self.clock.later(faults.partition.after + faults.partition.seconds, lambda: self._mend(cut))

    def _plan_reboot(self, device: SimulatedDevice, chance: random.Random) -> None:
        def reboot() -> None:
            device.reboot()
            self._plan_reboot(device, chance)

        self.clock.later(chance.expovariate(self.scenario.faults.reboots_per_day / 86400.0), reboot)

    def _cut(self, devices: list[SimulatedDevice]) -> None:
        self.note("-", "partition", f"{len(devices)} devices")
        for device in devices:
            self._lines[device.traits.name].cut = True
            device.lose_network()

    def _mend(self, devices: list[SimulatedDevice]) -> None:
        self.note("-", "mended", f"{len(devices)} devices")
        for device in devices:
            self._lines[device.traits.name].cut = False

    def _result(self, outcome: Outcome, seconds: float) -> SimulationResult:
        new = {bundle.digest for bundle in self._prepared.new.values()}
        old = {bundle.digest for bundle in self._prepared.old.values()}
        reached = [device for device in self.devices if device.reached & new]
        return SimulationResult(
            state=outcome.state,
            total=len(self.devices),
            reached=len(reached),
            reverted=sum(device.running in old for device in reached),
            failed=outcome.failed,
            reason=outcome.reason,
            seconds=seconds,
            messages=self.bus.messages,
            bytes=self.bus.bytes,
            log=self._hash.hexdigest(),
        )

    def close(self) -> None:
        """End the controller."""
        self.controller.stop()


class _Hearing(VirtualConnection):
    """The controller's connection: says when a message has come."""

    def __init__(self, heard: Callable[[str], None], bus: Bus, line: Line, *args: object, **options: object) -> None:
        super().__init__(bus, line, *args, **options)  # type: ignore[arg-type]
        told = self._on_message

        def take(topic: str, payload: bytes, retained: bool) -> None:
            told(topic, payload, retained)
            heard(topic)

        self._on_message = take


@contextlib.contextmanager
def _folder(state: Path | None) -> Iterator[Path]:
    if state is not None:
        yield state
        return
    with tempfile.TemporaryDirectory(prefix="kedge-simulate-") as made:
        yield Path(made)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what thousands of devices log about their faults to themselves."""
    names = ("kedge.fleet", "kedge_agent")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def simulate(scenario: Scenario, *, state: Path | None = None, log: TextIO | None = None) -> SimulationResult:
    """Run a scenario in virtual time.

    Args:
        scenario: what to simulate.
        state: an empty folder for the fleet's state, which stays; None for a temporary one.
        log: written to, a line for each event.

    Raises:
        ConfigError: the rollout's policy does not fit.
        TargetError: there is no such target.
        StorageError: no space.
    """
    with _quiet(), _folder(state) as folder:
        world = VirtualWorld(scenario, folder, log=log)
        try:
            with FleetService(folder, actor="simulator", clock=world.clock.wall) as fleet:
                return world.run(Rollout(fleet, f"{MODEL}:{scenario.new.version}", scenario.rollout))
        finally:
            world.close()

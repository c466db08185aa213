"""Runs a scenario in virtual time: simulated devices, and the real controller on the real database."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from kedge.fleet.controller import TICK_SECONDS, Controller
from kedge.fleet.service import FleetService
from kedge.simulator.bus import Bus, Line, VirtualConnection
from kedge.simulator.clock import Timer, VirtualClock
from kedge.simulator.outcome import UNFINISHED, Rollout
from kedge.simulator.result import SimulationResult
from kedge.simulator.scenario import MODEL, Scenario
from kedge.simulator.traits import Traits
from kedge.simulator.world import START_SECONDS, SimulatedFleet
from kedge_protocol.broker import Broker
from kedge_protocol.channel import Channel

BROKER = Broker(host="simulated", port=1883)
_GARBAGE = (50_000, 50, 100)
"""Thresholds of the garbage collector's generations while a simulation runs."""


class VirtualFleet(SimulatedFleet):
    """A simulated fleet in virtual time, with the real controller.

    Args:
        scenario: what to simulate.
        state: an empty folder for the fleet's state.
        log: written to, a line for each event; None for none.
    """

    def __init__(self, scenario: Scenario, state: Path, *, log: TextIO | None = None) -> None:
        self.clock = VirtualClock()
        self.bus = Bus(self.clock, random.Random(f"{scenario.seed} network"))
        super().__init__(scenario, state, BROKER, log=log)
        self._lines = {device.traits.name: self._line(device.traits) for device in self.devices}
        self.controller = Controller(
            state,
            BROKER,
            clock=self.clock.wall,
            steady=self.clock.steady,
            connect=partial(_Hearing, self._controller_heard, self.bus, Line(lambda: False)),
            block_thread=False,
        )
        self._due: Timer | None = None
        self._has_ended = False

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

    def _line(self, one: Traits) -> Line:
        faults = self.scenario.faults
        is_cut = partial(self.cut.__contains__, one.name)
        return Line(is_cut, faults.loss, faults.latency * one.slow, faults.jitter * one.slow)

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
        self.controller.start()
        self.plan_starts(START_SECONDS)
        self._regular_tick()
        clock.run(scenario.before, lambda: False)
        began = clock.now
        rollout.start()
        self.note("-", "rollout", scenario.new.version)
        self._tick_within(0.0)
        self.plan_faults()
        self._watch(rollout)
        clock.run(began + scenario.limit, lambda: self._has_ended)
        found = rollout.look()
        self.note("-", "end", f"{found.state} {found.reason}")
        return self.result(found, clock.now - began, self.bus.messages, self.bus.bytes)

    def _watch(self, rollout: Rollout) -> None:
        self._has_ended = rollout.look().state != UNFINISHED
        if not self._has_ended:
            self.clock.later(self.scenario.tick, lambda: self._watch(rollout))

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
def state_folder(state: Path | None) -> Iterator[Path]:
    """Yield a folder for the fleet's state; a temporary one if none is given."""
    if state is not None:
        yield state
        return
    with tempfile.TemporaryDirectory(prefix="kedge-simulate-") as made:
        yield Path(made)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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


@contextlib.contextmanager
def collecting_seldom() -> Iterator[None]:
    """Let the garbage collector look seldom: devices live as long as the simulation, and looking at all of them again
    and again takes a tenth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(*_GARBAGE)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        # The fleet that has ended, before another one begins: it is made of cycles.
        gc.collect()


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
    with quiet(), collecting_seldom(), state_folder(state) as folder:
        virtual = VirtualFleet(scenario, folder, log=log)
        try:
            with FleetService(folder, actor="simulator", clock=virtual.clock.wall) as fleet:
                return virtual.run(Rollout(fleet, f"{MODEL}:{scenario.new.version}", scenario.rollout))
        finally:
            virtual.close()

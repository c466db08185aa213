"""Runs a scenario in real time on a real broker: simulated devices here, the controller in a process of its own."""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

from kedge.fleet.options import DEFAULT_LISTEN
from kedge.fleet.service import FleetService
from kedge.simulator.bus import Line
from kedge.simulator.clock import Timer
from kedge.simulator.controller_process import ControllerProcess
from kedge.simulator.file_descriptors import allow_connections
from kedge.simulator.loop import Loop, LoopConnection
from kedge.simulator.outcome import UNFINISHED, Rollout
from kedge.simulator.result import ControllerCost, SimulationResult
from kedge.simulator.scenario import MODEL, Scenario
from kedge.simulator.traits import Traits
from kedge.simulator.virtual import quiet, state_folder
from kedge.simulator.world import SimulatedFleet
from kedge_protocol.broker import Broker, parse_broker
from kedge_protocol.channel import Channel
from kedge_protocol.errors import FleetError

EMBEDDED = "embedded"
_LOOK_SECONDS = 1.0
_CONNECTIONS_A_SECOND = 100.0
_ALL_THERE_SECONDS = 300.0


class LiveFleet(SimulatedFleet):
    """A simulated fleet in real time.

    Args:
        scenario: what to simulate.
        state: an empty folder for the fleet's state.
        broker: where its devices connect.
        log: written to, a line for each event; None for none.
    """

    def __init__(self, scenario: Scenario, state: Path, broker: Broker, *, log: TextIO | None = None) -> None:
        self.loop = Loop()
        self._since = time.monotonic()
        self._chance = random.Random(f"{scenario.seed} network")
        self._noting = threading.Lock()
        self._run_id = f"{uuid.uuid4().hex[:8]}-"
        super().__init__(scenario, state, broker, log=log)

    @property
    def run_id(self) -> str:
        """Another one each time."""
        return self._run_id

    def steady(self) -> float:
        """Return the seconds since the simulation's start."""
        return time.monotonic() - self._since

    def wall(self) -> float:
        """Return the seconds since 1970."""
        return time.time()

    def later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function after so many seconds."""
        return self.loop.later(seconds, function)

    def connect(self, traits: Traits) -> Callable[..., Channel]:
        """Return what makes a device's connection."""
        faults = self.scenario.faults
        is_cut = partial(self.cut.__contains__, traits.name)
        line = Line(is_cut, faults.loss, faults.latency * traits.slow, faults.jitter * traits.slow)
        return partial(LoopConnection, self.loop, line, self._chance)

    def lose(self, traits: Traits, connection: Channel, *, for_ever: bool) -> None:
        """Cut a device's connection."""
        if isinstance(connection, LoopConnection):
            connection.lose(back=not for_ever)

    def note(self, device: str, what: str, detail: str) -> None:
        """Write a line of the log."""
        with self._noting:
            super().note(device, what, detail)

    def run(self, fleet: FleetService, controller: ControllerProcess, started: Callable[[], None]) -> SimulationResult:
        """Run the scenario to its end.

        Args:
            started: called when the rollout has begun.
        """
        scenario = self.scenario
        self.loop.start()
        self.plan_starts(len(self.devices) / _CONNECTIONS_A_SECOND)
        self._wait("the devices at the broker", _ALL_THERE_SECONDS, lambda: self._all_there(fleet), controller)
        self._wait("", scenario.before, lambda: False, controller, fails=False)
        rollout = Rollout(fleet, f"{MODEL}:{scenario.new.version}", scenario.rollout)
        began = time.monotonic()
        before = controller.cpu_seconds
        rollout.start()
        self.note("-", "rollout", scenario.new.version)
        self.later(0.0, self.plan_faults)
        started()

        def ended() -> bool:
            return rollout.look().state != UNFINISHED

        self._wait("the rollout", scenario.limit, ended, controller, fails=False)
        found = rollout.look()
        self.note("-", "end", f"{found.state} {found.reason}")
        seconds = time.monotonic() - began
        cost = ControllerCost(cpu_seconds=controller.cpu_seconds - before, peak_bytes=controller.peak_bytes)
        return self.result(found, seconds, self.loop.messages, self.loop.bytes, cost)

    def _all_there(self, fleet: FleetService) -> bool:
        return fleet.device_list(limit=1).online == len(self.devices)

    def _wait(
        self,
        what: str,
        seconds: float,
        ready: Callable[[], bool],
        controller: ControllerProcess,
        *,
        fails: bool = True,
    ) -> None:
        end = time.monotonic() + seconds
        while not ready() and time.monotonic() < end:
            if self.loop.problem is not None:
                raise self.loop.problem
            controller.check()
            time.sleep(min(_LOOK_SECONDS, max(0.0, end - time.monotonic())))
        if fails and time.monotonic() >= end:
            raise FleetError(f"not within {seconds:.0f} s: {what}", where=self.broker.url)


@contextlib.contextmanager
def running(
    scenario: Scenario,
    broker: str,
    *,
    state: Path | None = None,
    listen: str = DEFAULT_LISTEN,
    page: str | None = None,
    log: TextIO | None = None,
) -> Iterator[tuple[LiveFleet, FleetService, ControllerProcess]]:
    """Yield a fleet that is not started yet, its service, and a controller that is at its broker; end them afterwards.

    Args:
        broker: ``mqtt://HOST:PORT``, or ``embedded`` for one in the controller's process.
        listen: the embedded broker's address.
        page: the page's address; None for no page.

    Raises:
        ConfigError: this process may not have so many connections.
        FleetError: the controller does not come up.
    """
    url = f"mqtt://{listen}" if broker == EMBEDDED else broker
    arguments = ["--embedded", "--listen", listen] if broker == EMBEDDED else ["--broker", url]
    allow_connections(scenario.total)
    with quiet(), state_folder(state) as folder:
        live = LiveFleet(scenario, folder, parse_broker(url), log=log)
        controller = ControllerProcess(folder, [*arguments, *(["--page", page] if page else [])])
        try:
            controller.wait_connected(folder)
            with FleetService(folder, actor="simulator") as fleet:
                yield live, fleet, controller
        finally:
            live.loop.stop()
            controller.stop()


def simulate_live(
    scenario: Scenario,
    broker: str,
    *,
    state: Path | None = None,
    listen: str = DEFAULT_LISTEN,
    page: str | None = None,
    log: TextIO | None = None,
    started: Callable[[], None] = lambda: None,
) -> SimulationResult:
    """Run a scenario in real time on a real broker; see :func:`running` for the arguments.

    Args:
        started: called when the rollout has begun.

    Raises:
        ConfigError: the rollout's policy does not fit.
        FleetError: the controller ends, or the devices do not come to the broker.
    """
    with running(scenario, broker, state=state, listen=listen, page=page, log=log) as (live, fleet, controller):
        return live.run(fleet, controller, started)

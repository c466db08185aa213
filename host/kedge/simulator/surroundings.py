"""What a simulated device sees of the simulation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from kedge.simulator.clock import Timer
from kedge.simulator.scenario import Scenario
from kedge.simulator.traits import Traits
from kedge_protocol.broker import Broker
from kedge_protocol.channel import Channel
from kedge_protocol.trust import Trust


class World(Protocol):
    """What a device sees of the simulation."""

    @property
    def scenario(self) -> Scenario:
        """The scenario."""

    @property
    def run_id(self) -> str:
        """In each boot id: on a broker that still holds an earlier simulation's retained states, theirs are others."""

    @property
    def trust(self) -> Trust:
        """The keys that its kit gave."""

    @property
    def broker(self) -> Broker:
        """Where to connect."""

    @property
    def noise(self) -> np.random.Generator:
        """Draws many numbers at once."""

    def steady(self) -> float:
        """Return seconds of a monotonic clock."""

    def wall(self) -> float:
        """Return seconds since 1970."""

    def later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function after so many seconds."""

    def connect(self, traits: Traits) -> Callable[..., Channel]:
        """Return what makes this device's connection."""

    def lose(self, traits: Traits, connection: Channel, *, for_ever: bool) -> None:
        """Cut a device's connection."""

    def note(self, device: str, what: str, detail: str) -> None:
        """Write a line of the log."""

"""The outcome of a simulation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ControllerCost:
    """What the controller's process took for the rollout: CPU seconds, and the peak of its resident memory in bytes."""

    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """The outcome of a simulation.

    Attributes:
        state: ``done``, ``aborted``, or ``unfinished`` if the scenario's limit came first.
        total: number of devices.
        reached: devices that really switched to the new release.
        reverted: those of them that run the old one at the end.
        failed: devices that refused the new release.
        wave: the last wave that began; 0 of a plain rollout.
        reason: why it was aborted, or what it waits for; empty otherwise.
        seconds: from the rollout's start to its end, in the simulation's time.
        messages, bytes: that clients sent to the broker, in the whole simulation.
        backends: where the new release has several bundles of a target: how many devices run which at the end.
        measured: devices that proved two of them to choose.
        log: SHA-256 of the log: equal for equal scenarios in virtual time.
        controller: its cost in real time; None in virtual time.
    """

    state: str
    total: int
    reached: int
    reverted: int
    failed: int
    wave: int
    reason: str
    seconds: float
    messages: int
    bytes: int
    log: str
    controller: ControllerCost | None = None
    backends: dict[str, int] = field(default_factory=dict)
    measured: int = 0

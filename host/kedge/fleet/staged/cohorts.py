"""The evidence of a rollout: what the devices of one target measured, device by device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The values of blocks of time (minutes) of one device: their number, mean, and sum of squared deviations."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def with_value(self, value: float) -> Spread:
        """Return the spread with one more value (B. P. Welford, 1962)."""
        count = self.count + 1
        delta = value - self.mean
        mean = self.mean + delta / count
        return Spread(count=count, mean=mean, squares=self.squares + delta * (value - mean))


@dataclass(frozen=True, kw_only=True)
class Share:
    """Counts of one device, some of them bad.

    Attributes:
        total, bad: over all blocks of time.
        blocks: number of blocks with any count.
        squares: the sum over blocks of ``bad² / total``, by which the dispersion between blocks is measured.
    """

    total: int = 0
    bad: int = 0
    blocks: int = 0
    squares: float = 0.0

    @property
    def rate(self) -> float:
        """``bad / total``; 0.0 without counts."""
        return self.bad / self.total if self.total else 0.0

    def with_block(self, total: int, bad: int) -> Share:
        """Return the share with one more block."""
        if total <= 0:
            return self
        return Share(
            total=self.total + total,
            bad=self.bad + bad,
            blocks=self.blocks + 1,
            squares=self.squares + bad * bad / total,
        )


@dataclass(frozen=True, kw_only=True)
class DeviceCalls:
    """The calls of one bundle on one device.

    Attributes:
        calls: inferences with their errors.
        p95, p99: natural logarithms of the milliseconds, by blocks of time; of a language model those of one token.
        first: of a language model, the same of the 95th percentile of the times to the first token.
        buckets: latency histogram, see :mod:`kedge_protocol.latency_buckets`; empty where devices do not send one.
    """

    device: str
    calls: Share = Share()
    p95: Spread = Spread()
    p99: Spread = Spread()
    first: Spread = Spread()
    buckets: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CallFigures:
    """The calls of one bundle on the devices of one target."""

    devices: tuple[DeviceCalls, ...] = ()

    @property
    def inferences(self) -> int:
        """All calls."""
        return sum(device.calls.total for device in self.devices)

    @property
    def errors(self) -> int:
        """The calls that failed."""
        return sum(device.calls.bad for device in self.devices)

    @property
    def error_rate(self) -> float:
        """The share that failed; 0.0 without calls."""
        return self.errors / self.inferences if self.inferences else 0.0

    def latency_ms(self, name: str) -> float | None:
        """Return the devices' geometric mean of ``p95``, ``p99`` or ``first``; None where none measured it."""
        known = [spread.mean for device in self.devices if (spread := getattr(device, name)).count]
        return math.exp(math.fsum(known) / len(known)) if known else None


@dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """The growth of memory on one device.

    Attributes:
        new, old: bytes per minute since the switch (without the first minutes), and before it; both None of a device
            that has not measured for long enough yet.
        variance: of ``new``.
        points: values behind ``new``.
    """

    device: str
    new: float | None = None
    old: float | None = None
    variance: float = 0.0
    points: int = 0


@dataclass(frozen=True, kw_only=True)
class DeviceTemperature:
    """The hottest zone of one device, mean in °C, with the new and with the old bundle; None if not measured."""

    device: str
    new: float | None = None
    old: float | None = None


@dataclass(frozen=True, kw_only=True)
class DeviceShadow:
    """How often one device's shadow answered otherwise than the bundle that serves, or failed (``compared.bad``).

    Attributes:
        classes: class of the old answer → (compared, agreed).
        confidence_shift: mean of new minus old; None if not measured.
    """

    device: str
    compared: Share = Share()
    classes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    confidence_shift: float | None = None


@dataclass(frozen=True, kw_only=True)
class ShadowFigures:
    """The new bundle beside the old one, on live inputs."""

    devices: tuple[DeviceShadow, ...] = ()

    @property
    def compared(self) -> int:
        """All inputs that both bundles answered."""
        return sum(device.compared.total for device in self.devices)

    @property
    def agreement(self) -> float | None:
        """The share of equal answers; None without any."""
        bad = sum(device.compared.bad for device in self.devices)
        return 1 - bad / self.compared if self.compared else None


@dataclass(frozen=True, kw_only=True)
class DeviceDrift:
    """The population stability index of one device's figures against the calibration baseline, less what so few
    samples make by chance; None if not measured."""

    device: str
    samples: int = 0
    inputs: float | None = None
    outputs: float | None = None
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class DriftFigures:
    """Drift of a cohort: ``inputs``, ``outputs`` and ``confidence`` are of all devices' sketches merged."""

    devices: tuple[DeviceDrift, ...] = ()
    inputs: float | None = None
    outputs: float | None = None
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class CohortEvidence:
    """The devices of one target in the waves that have started so far.

    Attributes:
        devices: how many there are.
        serving: of them, those that serve the new bundle.
        failed: those on which it failed, whatever the stage.
        silent: those that were not heard of for longer than the time-out.
        proof_failed: those whose golden vectors refused it, among ``failed``.
        served_by_calls, served_by_golden: those that attest that this bundle answered calls of users, or golden
            samples at the served endpoint; None from agents that do not say.
        control_devices, control_silent: devices of the target that no wave has reached yet, and the silent ones.
        new, old: calls of the new bundle, and of the bundle before it, on these devices and those of the control.
        memory_slope, temperature_c: of each device that measures it.
        shadow, drift: None where none is asked for and none came.
    """

    target: str
    devices: int = 0
    serving: int = 0
    failed: int = 0
    silent: int = 0
    proof_failed: int = 0
    served_by_calls: int | None = None
    served_by_golden: int | None = None
    control_devices: int = 0
    control_silent: int = 0
    new: CallFigures = CallFigures()
    old: CallFigures = CallFigures()
    memory_slope: tuple[DeviceMemory, ...] = ()
    temperature_c: tuple[DeviceTemperature, ...] = ()
    shadow: ShadowFigures | None = None
    drift: DriftFigures | None = None

    @cached_property
    def writes_text(self) -> bool:
        """Whether the figures are of a language model."""
        return any(device.first.count for calls in (self.new, self.old) for device in calls.devices)

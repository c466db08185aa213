"""Parts of telemetry that only some devices and models send."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class BoardTelemetry:
    """Telemetry of boards with their own sensors (Jetson).

    Attributes:
        gpu_percent: the load of the GPU, 0..100.
        power_mw: rail → milliwatts.
        temperatures_c: zone → degrees Celsius.
        power_mode: the board's name for its power mode.
    """

    gpu_percent: float | None = None
    power_mw: dict[str, int] = field(default_factory=dict)
    temperatures_c: dict[str, float] = field(default_factory=dict)
    power_mode: str | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationTelemetry:
    """How fast a language model answered in one interval.

    Attributes:
        first_token_buckets: times from requests to the first tokens of their answers, see
            :mod:`kedge_protocol.latency_buckets`.
        token_buckets: times of one token after the first, each answer's mean; tokens a second are the reverse.
    """

    first_token_buckets: dict[str, int] = field(default_factory=dict)
    token_buckets: dict[str, int] = field(default_factory=dict)

"""Settings of the update logic that an operator may change, with their bounds."""

from __future__ import annotations

from dataclasses import dataclass

from kedge_protocol.errors import ConfigError

MAX_SECONDS = 604800.0
"""A week; no deadline is longer."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of the update machine.

    Attributes:
        window: largest number of pending blocks over all downloads (1 to 256).
        silence: seconds without any answer before blocks are requested again; grows with each failed attempt, with
            jitter.
        serve_deadline: seconds that the serving process has to load a new bundle.
        crashes: number of deaths of the serving process within ``crash_window`` seconds that counts as a crash loop (2
            to 1000): a bundle that was switched to within that time is rolled back.
        disk_deadline: seconds without an outcome of the disk's thread after which a step that waits for it fails.
        prove_deadline: the same for golden vectors, including what a backend builds before them.
        fetch_deadline: seconds without a new block from an online controller after which a fetch fails.
        endpoint_retry: seconds before golden samples are sent again through a served endpoint that did not answer;
            doubles with each attempt, up to an hour.
        reserve_bytes: free disk space that a download must leave.
        bytes_per_second: limit of requested bytes over all downloads; 0 for none.
    """

    window: int = 16
    silence: float = 20.0
    serve_deadline: float = 60.0
    crashes: int = 3
    crash_window: float = 600.0
    disk_deadline: float = 1800.0
    prove_deadline: float = 3900.0
    fetch_deadline: float = 86400.0
    endpoint_retry: float = 5.0
    reserve_bytes: int = 16 << 20
    bytes_per_second: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= 256:
            raise ConfigError(f"a window of {self.window} blocks", remedy="Use 1 to 256")
        if self.bytes_per_second < 0:
            raise ConfigError(f"a rate of {self.bytes_per_second} bytes a second", remedy="Use 0 for no limit, or more")
        if not 2 <= self.crashes <= 1000:
            raise ConfigError(f"{self.crashes} crashes", remedy="Use 2 to 1000")
        for name in ("silence", "serve_deadline", "crash_window", "disk_deadline", "prove_deadline", "fetch_deadline",
                     "endpoint_retry"):  # fmt: skip
            if not 0.1 <= getattr(self, name) <= MAX_SECONDS:
                raise ConfigError(f"{name} is {getattr(self, name)} s", remedy=f"Use 0.1 to {MAX_SECONDS:g}")

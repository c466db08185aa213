"""What an operator may turn in the update logic, with its bounds."""

from __future__ import annotations

from dataclasses import dataclass

from kedge_protocol.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Limits of the update machine.

    Attributes:
        window: blocks asked for and not yet answered, over all downloads (1 to 256).
        silence: seconds without any answer before asking again; grows with each vain try, with jitter.
        serve_deadline: seconds that the serving child has to load a new bundle.
        reserve_bytes: free space that a download must leave.
        bytes_per_second: of blocks asked for, over all downloads; 0 for no limit.
    """

    window: int = 16
    silence: float = 20.0
    serve_deadline: float = 60.0
    reserve_bytes: int = 16 << 20
    bytes_per_second: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.window <= 256:
            raise ConfigError(f"a window of {self.window} blocks", remedy="Use 1 to 256")
        if self.bytes_per_second < 0:
            raise ConfigError(f"a rate of {self.bytes_per_second} bytes a second", remedy="Use 0 for no limit, or more")
        for name in ("silence", "serve_deadline"):
            if not 0.1 <= getattr(self, name) <= 86400:
                raise ConfigError(f"{name} is {getattr(self, name)} s", remedy="Use 0.1 to 86400")

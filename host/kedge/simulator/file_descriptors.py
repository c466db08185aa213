"""The number of connections that this process, and those that it starts, may have."""

from __future__ import annotations

import contextlib

from kedge_protocol.errors import ConfigError

_OTHERS = 256
"""Files and connections beside the devices'."""


def allow_connections(devices: int) -> None:
    """Raise the soft limit of open files, if it is too low for so many devices.

    Raises:
        ConfigError: the system does not allow so many.
    """
    with contextlib.suppress(ImportError):  # a system without such limits
        import resource

        wanted = devices + _OTHERS
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY or soft >= wanted:
            return
        if hard != resource.RLIM_INFINITY and hard < wanted:
            raise ConfigError(
                f"{devices} devices need {wanted} open files, and the system allows {hard}",
                remedy="Raise the limit (ulimit -Hn), or simulate fewer devices",
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

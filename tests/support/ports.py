"""Ports of the loopback interface: free ones, handed out once on this machine at a time, and who listens."""

from __future__ import annotations

import random
import socket
from collections import deque
from pathlib import Path

_LOWEST = 20000
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_KEPT = 16
_reserved: deque[socket.socket] = deque()


def _highest() -> int:
    """The last port that no outgoing connection takes by itself; such a one would steal it before its server starts."""
    try:
        return max(int(_RANGE.read_text().split()[0]) - 1, _LOWEST + 1000)
    except OSError:
        return 32767


def free_port() -> int:
    """A port of the loopback interface without a listener, which no other test takes meanwhile."""
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.randint(_LOWEST, _highest())
        # An abstract socket by the port's number is the reservation: the kernel drops it with the process.
        reservation = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            reservation.bind(f"\0kedge-test-port-{port}")
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reserved.append(reservation)
        if len(_reserved) > _KEPT:  # its server listens by now, and a process has few descriptors
            _reserved.popleft().close()
        return port
    raise RuntimeError(f"no free port from {_LOWEST} to {_highest()}")


def listens(port: int) -> bool:
    """Whether a server accepts connections on a port of the loopback interface."""
    with socket.socket() as probe:
        probe.settimeout(5.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0

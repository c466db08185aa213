"""Load for a server on this machine, and what it costs the server's process tree."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


class Target:
    """One request to a port, again and again on a connection that stays.

    Args:
        request: the bytes of head and body.
    """

    def __init__(self, port: int, request: bytes) -> None:
        self.port = port
        self.request = request
        self._link: socket.socket | None = None

    def copy(self) -> Target:
        """The same on a connection of its own."""
        return Target(self.port, self.request)

    def ask(self) -> bytes:
        """The whole response.

        Raises:
            OSError: the connection was refused or ended.
        """
        if self._link is None:
            self._link = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        self._link.sendall(self.request)
        data = b""
        while b"\r\n\r\n" not in data:
            data += self._more()
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        while len(body) < length:
            body += self._more()
        return head + b"\r\n\r\n" + body

    def answers(self) -> bool:
        """Whether one request gets a 200."""
        try:
            return b" 200 " in self.ask()[:16]
        except OSError:
            self._link = None
            return False

    def _more(self) -> bytes:
        data = b"" if self._link is None else self._link.recv(1 << 16)
        if not data:
            self._link = None
            raise ConnectionError("the server closed the connection")
        return data


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / _TICKS
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(cpu_seconds(int(child)) for child in children)


def load(target: Target, pid: int, clients: int, requests: int) -> float:
    """CPU µs a request of the server, with so many clients at once."""
    targets = [target.copy() for _ in range(clients)]
    failed: list[bytes] = []

    def work(one: Target) -> None:
        for _ in range(requests // clients):
            answer = one.ask()
            if b" 200 " not in answer[:16]:
                failed.append(answer)

    for one in targets:
        one.answers()
    began = cpu_seconds(pid)
    threads = [threading.Thread(target=work, args=(one,)) for one in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0][:500]!r}")
    return (cpu_seconds(pid) - began) / (requests // clients * clients) * 1e6


def health_milliseconds(port: int, count: int) -> float:
    """The longest of so many requests for health, each on a new connection."""
    worst = 0.0
    for _ in range(count):
        began = time.perf_counter()
        Target(port, b"GET /v2/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").answers()
        worst = max(worst, time.perf_counter() - began)
    return worst * 1000


def wrk_rate(port: int, path: str, body: bytes, clients: int) -> float | None:
    """Requests a second by wrk; None where it is not installed, which is said."""
    if shutil.which("wrk") is None:
        print("skipped: requests a second (apt-get install wrk)")
        return None
    with tempfile.TemporaryDirectory() as scratch:
        script = Path(scratch) / "post.lua"
        (Path(scratch) / "body").write_bytes(body)
        script.write_text(
            f'wrk.method = "POST"\nlocal file = io.open("{scratch}/body", "rb")\nwrk.body = file:read("*a")\n'
            'wrk.headers["Content-Type"] = "application/json"\n'
        )
        command = ["wrk", "-t1", f"-c{clients}", "-d3s", "-s", str(script), f"http://127.0.0.1:{port}{path}"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = next(line for line in out.splitlines() if line.startswith("Requests/sec"))
    return float(line.split()[1])

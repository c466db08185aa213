"""The controller of a simulation in real time, in a process of its own.

Run as a module it is that process: ``kedge`` with the arguments given, which ends when its standard input does. So it
does not outlive a simulation that is killed with SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from kedge.fleet import health
from kedge_protocol.errors import FleetError, KedgeError

_CONTROLLER_SECONDS = 60.0
_LAST_WORDS_SECONDS = 20.0
"""For a controller to leave its broker by itself."""


class ControllerProcess:
    """The controller, in a process of its own, which ends with this one however that ends.

    Args:
        state: the fleet's state folder; the controller's log lies beside it.
        arguments: of ``kedge controller run``.
    """

    def __init__(self, state: Path, arguments: Sequence[str]) -> None:
        self.log = state / "controller.log"
        command = [sys.executable, "-m", __name__, "controller", "run", "--state", str(state), *arguments]
        with self.log.open("wb") as output:
            self._child = subprocess.Popen(command, stdout=output, stderr=output, stdin=subprocess.PIPE)

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._child.pid

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds so far; 0 where the system does not tell."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_bytes(self) -> int:
        """Largest resident memory so far; 0 where the system does not tell."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        except OSError:
            return 0
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")), 0)

    def check(self) -> None:
        """See that it runs.

        Raises:
            FleetError: it has ended; the message has its log's end.
        """
        if self._child.poll() is not None:
            last = "\n".join(self.log.read_text(errors="replace").splitlines()[-5:])
            raise FleetError(f"the controller has ended with status {self._child.returncode}:\n{last}")

    def wait_connected(self, state: Path) -> None:
        """Wait until it is at its broker.

        Raises:
            FleetError: it has ended, or is not.
        """
        end = time.monotonic() + _CONTROLLER_SECONDS
        while True:
            self.check()
            try:
                health.check(state)
            except KedgeError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)
            else:
                return

    def stop(self) -> None:
        """End it."""
        if self._child.poll() is None:
            self._child.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_LAST_WORDS_SECONDS)
        if self._child.poll() is None:
            self._child.kill()
            self._child.wait()
        if self._child.stdin is not None:
            self._child.stdin.close()


def _end_with_the_simulation() -> None:
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_LAST_WORDS_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_the_simulation, name="end with the simulation", daemon=True).start()
    runpy.run_module("kedge.cli.main", run_name="__main__")

"""Real brokers on free loopback ports."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ports import free_port, listens
from tests.support.requirements import program
from tests.support.waiting import wait_for


class Mosquitto:
    """A mosquitto that can be killed and started again on the same port.

    Args:
        folder: for its configuration and log.
        lines: added to the configuration, after the listener; the default lets everybody in.
    """

    def __init__(self, folder: Path, lines: tuple[str, ...] = ("allow_anonymous true",)) -> None:
        self.port = free_port()
        self.url = f"mqtt://127.0.0.1:{self.port}"
        self._config = folder / f"mosquitto-{self.port}.conf"
        self._log = folder / f"mosquitto-{self.port}.log"
        # A queue long enough that the test's own clients lose nothing; the daemon keeps its rights in the folder.
        settings = (f"listener {self.port} 127.0.0.1", "user root", "persistence false", "max_queued_messages 10000")
        self._config.write_text("\n".join((*settings, *lines, "")), encoding="utf-8")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it listens."""
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [program("mosquitto"), "-c", str(self._config)], stdout=output, stderr=output
            )
        wait_for(self._listens, what=f"mosquitto (see {self._log})")

    def _listens(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            pytest.fail(f"mosquitto ended: {self._log.read_text(encoding='utf-8')}")
        return listens(self.port)

    def kill(self) -> None:
        """End it with SIGKILL: retained messages are lost."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running mosquitto that lets everybody in."""
    broker = Mosquitto(tmp_path)
    broker.start()
    yield broker
    broker.kill()

"""An agent as its users run it: a process of its own, with a configuration file and a state folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedge_agent.slots import ModelFolder, Slot
from tests.support.ports import free_port
from tests.support.waiting import wait_for


class AgentProcess:
    """``kedge-agent run``; a context manager that ends what :meth:`start` started.

    Args:
        folder: for the configuration, the log and the state.
        url: of the broker.
        name, target: of the device.
        broker: lines of its table ``[broker]``.
        more: lines of the configuration.
        env: variables added to its environment.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        name: str = "dev",
        target: str = "generic-cpu",
        serve: bool = True,
        broker: str = "",
        more: str = "",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.state = folder / f"{name}-state"
        self.config = folder / f"{name}.toml"
        self.log = folder / f"{name}.log"
        self.port = free_port()
        self._env = {**os.environ, **(env or {})}
        self.config.write_text(
            f'[device]\nname = "{name}"\ntarget = "{target}"\n[broker]\nurl = "{url}"\n{broker}'
            f'[state]\npath = "{self.state.name}"\n[serve]\nenabled = {str(serve).lower()}\n'
            f'listen = "127.0.0.1:{self.port}"\n[telemetry]\ninterval = 0.5\n{more}',
            encoding="utf-8",
        )
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> AgentProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def start(self) -> AgentProcess:
        """Start it; returns at once."""
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kedge_agent.cli", "run", "--config", str(self.config)],
                stdout=output,
                stderr=output,
                env=self._env,
            )
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def text(self) -> str:
        """What it logged."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""

    def kill(self) -> None:
        """SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout: float = 60.0) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def current(self, model: str = "tiny") -> Slot | None:
        """The slot that serves."""
        return ModelFolder(self.state, model).current()

    def wait_current(self, digest: str, model: str = "tiny", timeout: float = 120.0) -> None:
        """Wait until this bundle is current."""

        def there() -> bool:
            slot = self.current(model)
            return slot is not None and slot.digest == digest

        wait_for(there, timeout, what=f"{digest[:19]} as the current slot (see {self.log})")

    def ask(self, path: str, body: object = None) -> dict[str, Any] | None:
        """One HTTP call of its door; None where nobody answers or the answer is an error."""
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", data, timeout=60) as answer:
                found: dict[str, Any] = json.load(answer)
                return found
        except (OSError, ValueError):
            return None

    def children(self) -> list[int]:
        """Its child processes."""
        listed = Path(f"/proc/{self.pid}/task/{self.pid}/children")
        return [int(pid) for pid in listed.read_text().split()]

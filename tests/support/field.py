"""A fleet in the field: a controller and agents as processes of their own, each agent in the environment of its kind of
device, on a broker of the test's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedge.demo.processes import Process, ask, command_of, run, wait_until
from kedge.fleet.keys import Keys
from kedge.fleet.results import RolloutStatus
from kedge.fleet.service import FleetService
from kedge_protocol import codec
from tests.support import requirements
from tests.support.ports import free_port
from tests.support.requirements import ROOT

DEVICE = ROOT / ".venv-device"
LEGACY = ROOT / ".venv-legacy"


def agent_of(environment: Path) -> str:
    """The agent's command in an environment that ``make test`` sets up.

    Where it is missing, see :func:`tests.support.requirements.missing`.
    """
    command = environment / "bin" / "kedge-agent"
    if not command.exists():
        requirements.missing(f"the environment {environment.name}", "make setup")
    return str(command)


@dataclass
class Device:
    """One device: its agent's process, state folder and endpoint."""

    name: str
    target: str
    state: Path
    endpoint: str
    process: Process

    def infer(self, model: str, tensor: str, batch: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Outputs of a batch, sent one sample a call through the agent's HTTP endpoint."""
        rows = []
        for sample in np.asarray(batch, dtype=np.float32):
            body = {"name": tensor, "datatype": "FP32", "shape": [1, *sample.shape], "data": sample.ravel().tolist()}
            answer = ask(f"{self.endpoint}/v2/models/{model}/infer", {"inputs": [body]})
            output = answer["outputs"][0]
            # Text that is read back as the same float32 need not be the same float64.
            rows.append(np.array(output["data"], dtype=np.float32 if output["datatype"] == "FP32" else None))
        return np.array(rows)


class Field:
    """Ends everything at the end of the ``with`` block.

    Args:
        folder: for states and logs.
        broker: ``mqtt://host:port``; None for the controller's embedded one.
    """

    def __init__(self, folder: Path, broker: str | None = None) -> None:
        self.folder = folder
        listen = f"127.0.0.1:{free_port()}"
        options = ["--embedded", "--listen", listen] if broker is None else ["--broker", broker]
        self.broker = broker or f"mqtt://{listen}"
        self.state = folder / "fleet"
        self.env = {"KEDGE_FLEET_STATE": str(self.state)}
        self.devices: list[Device] = []
        self.controller = Process(
            [command_of("kedge"), "controller", "run", *options],
            log=folder / "controller.log",
            env=self.env,
        )

    def __enter__(self) -> Field:
        self.controller.start()
        return self

    def __exit__(self, *_: object) -> None:
        for device in self.devices:
            device.process.stop()
        self.controller.stop()

    def kedge(self, *arguments: str) -> str:
        """One ``kedge`` command against this fleet."""
        return run([command_of("kedge"), *arguments], env=self.env, echo=False)

    def add(
        self,
        name: str,
        target: str,
        command: str,
        *,
        env: Mapping[str, str] | None = None,
        more: str = "",
        **limits: int,
    ) -> Device:
        """Make a device known and start its agent.

        Args:
            env: added to the agent's environment.
            more: lines of its configuration.
        """
        self.kedge("device", "add", name, "--target", target, "--label", "site=test")
        folder = self.folder / name
        folder.mkdir()
        port = free_port()
        lines = "".join(f"{key} = {value}\n" for key, value in limits.items())
        (folder / "agent.toml").write_text(
            f'[device]\nname = "{name}"\ntarget = "{target}"\n[broker]\nurl = "{self.broker}"\n'
            f'[state]\npath = "state"\n[serve]\nlisten = "127.0.0.1:{port}"\n'
            f"[telemetry]\ninterval = 1\n[limits]\n{lines}{more}"
        )
        process = Process(
            [command, "run", "--config", str(folder / "agent.toml")], log=folder / "agent.log", env=env
        ).start()
        self.devices.append(Device(name, target, folder / "state", f"http://127.0.0.1:{port}", process))
        return self.devices[-1]

    def trust(self) -> str:
        """Lines of an agent's configuration with which it takes this fleet's signed states only."""
        path = self.folder / "trust.json"
        path.write_bytes(codec.encode(Keys(self.state).trust()))
        path.chmod(0o600)
        return f'[trust]\nfile = "{path}"\n'

    def publish(self, out: Path) -> None:
        """``kedge publish``."""
        self.kedge("publish", str(out))

    def start_rollout(self, release: str, *select: str) -> None:
        """``kedge rollout start``."""
        self.kedge("rollout", "start", release, *[part for label in select for part in ("--select", label)])

    def status(self) -> RolloutStatus:
        """The latest rollout."""
        with FleetService(self.state) as service:
            return service.rollout_status()

    def decided(self, *, seconds: float = 300) -> dict[str, str]:
        """Wait until every device of the latest rollout is done or failed; device → progress."""

        def look() -> RolloutStatus | None:
            status = self.status()
            return status if all(d.progress.value in ("done", "failed") for d in status.devices) else None

        status = wait_until(f"the rollout (logs in {self.folder})", look, seconds=seconds)
        return {device.device: device.progress.value for device in status.devices}

    def reasons(self) -> dict[str, str]:
        """Why devices of the latest rollout are where they are."""
        return {device.device: device.detail for device in self.status().devices}

    def shown(self, name: str) -> dict[str, Any]:
        """``kedge device show NAME --json``."""
        shown: dict[str, Any] = json.loads(self.kedge("device", "show", name, "--json"))
        return shown

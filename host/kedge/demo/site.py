"""The demo's site: a controller with its embedded broker and an agent for each device, each in its own process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kedge.demo.processes import DemoError, Process, ask, command_of, free_port, run, say, wait_until
from kedge.fleet.results import DeviceDetail, RolloutStatus
from kedge.fleet.service import FleetService

DEVICES = {"shop-window": "generic-cpu", "kitchen-pi": "rpi4", "till": "intel-cpu"}
"""Device name → target."""


@dataclass(frozen=True)
class Agent:
    """One device's agent.

    Attributes:
        endpoint: the address for inference calls.
    """

    name: str
    target: str
    state: Path
    endpoint: str
    process: Process


class Site:
    """The running site; start it with :meth:`start`, end it with :meth:`stop`.

    Args:
        folder: an empty folder for states and logs.
        devices: device name → target.
    """

    def __init__(self, folder: Path, devices: Mapping[str, str] = DEVICES) -> None:
        self.folder = folder
        self.devices = dict(devices)
        self.port = free_port()
        self.state = folder / "fleet"
        self.environment = {"KEDGE_FLEET_STATE": str(self.state)}
        self.agents: list[Agent] = []
        self.controller = Process(
            [command_of("kedge"), "controller", "run", "--embedded", "--listen", f"127.0.0.1:{self.port}"],
            log=folder / "controller.log",
            env=self.environment,
        )

    def start(self) -> None:
        """Start the broker and the controller, then register and start the devices."""
        self.controller.start()
        for name, target in self.devices.items():
            self.command("device", "add", name, "--target", target, "--label", "site=demo")
            self.agents.append(self._agent(name, target))
        with FleetService(self.state) as service:
            wait_until(
                f"the agents' first word (logs in {self.folder})",
                lambda: self._alive() and all(device.online and device.reported for device in service.devices()),
                seconds=60,
            )

    def command(self, *arguments: str) -> str:
        """Run one ``kedge`` command against this fleet."""
        return run([command_of("kedge"), *arguments], env=self.environment)

    def rollout(self, release: str, *, seconds: float = 120) -> RolloutStatus:
        """Start a rollout and wait until it has succeeded or failed on every device."""
        self.command("rollout", "start", release)
        with FleetService(self.state) as service:
            return wait_until(
                f"the rollout of {release} (logs in {self.folder})",
                lambda: self._decided(service.rollout_status()),
                seconds=seconds,
            )

    def device(self, name: str) -> DeviceDetail:
        """Return everything that the controller knows about one device."""
        with FleetService(self.state) as service:
            return service.device(name)

    def stop(self) -> None:
        """End every process."""
        for agent in self.agents:
            agent.process.stop()
        self.controller.stop()

    def _decided(self, status: RolloutStatus) -> RolloutStatus | None:
        self._alive()
        decided = all(device.progress.value in ("done", "failed") for device in status.devices)
        return status if decided else None

    def _alive(self) -> bool:
        """Return True, or raise an error with the log's end if a process has ended."""
        for process in (self.controller, *(agent.process for agent in self.agents)):
            if not process.running:
                raise DemoError(f"a process has ended:\n{process.tail()}", where=str(process.log))
        return True

    def _agent(self, name: str, target: str) -> Agent:
        folder = self.folder / name
        folder.mkdir()
        port = free_port()
        (folder / "agent.toml").write_text(
            f'[device]\nname = "{name}"\ntarget = "{target}"\n\n'
            f'[broker]\nurl = "mqtt://127.0.0.1:{self.port}"\n\n'
            '[state]\npath = "state"\n\n'
            f'[serve]\nlisten = "127.0.0.1:{port}"\n\n'
            "[telemetry]\ninterval = 1\n"
        )
        process = Process(
            [command_of("kedge-agent"), "run", "--config", str(folder / "agent.toml")], log=folder / "agent.log"
        ).start()
        return Agent(name, target, folder / "state", f"http://127.0.0.1:{port}", process)


def classify(agent: Agent, model: str, images: list[list[float]], shape: list[int]) -> list[list[float]]:
    """Send each sample to the agent's inference endpoint (Open Inference Protocol v2), one call per sample.

    Args:
        images: flattened samples.
        shape: the shape of one sample.

    Returns:
        The class scores of each sample.
    """
    scores = []
    for image in images:
        tensor = {"name": "image", "datatype": "FP32", "shape": [1, *shape], "data": image}
        answer = ask(f"{agent.endpoint}/v2/models/{model}/infer", {"inputs": [tensor]})
        scores.append([float(value) for value in answer["outputs"][0]["data"]])
    return scores


def staged(
    chapters: Callable[[Path, Site], None],
    how_to_look: Callable[[Path, Site], None],
    devices: Mapping[str, str] = DEVICES,
    *,
    keep: bool,
) -> None:
    """Run a demo's chapters on a site of its own, in a new folder.

    Args:
        how_to_look: says how to inspect what runs; called at the end with ``keep``.
        keep: leave everything running at the end.
    """
    folder = Path(tempfile.mkdtemp(prefix="kedge-demo-"))
    began = time.monotonic()
    site = Site(folder, devices)
    done = False
    try:
        chapters(folder, site)
        done = True
        say(f"\nDone in {time.monotonic() - began:.0f} s. Everything lies in {folder}")
        if keep:
            how_to_look(folder, site)
    finally:
        if not (keep and done):
            site.stop()

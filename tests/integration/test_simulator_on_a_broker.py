"""A simulated fleet in real time: real connections to a real broker, and the controller in a process of its own."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.brokers import Mosquitto
from tests.support.ports import free_port
from tests.support.waiting import wait_for

from kedge.simulator import file_descriptors
from kedge_protocol.errors import ConfigError

SCENARIO = """
before = 1
telemetry = 5
reports = 0
limit = 300
[runtime]
calls_per_minute = 600
prove_seconds = 0.2
load_seconds = 0.2
[[fleet]]
target = "rpi4"
count = 4
[[fleet]]
target = "rpi5"
count = 4
[new]
version = "2.0"
[[new.defects]]
targets = ["rpi4"]
golden_vectors = true
"""


def test_devices_on_the_embedded_broker_take_a_release_or_refuse_it(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(SCENARIO)
    arguments = ["--broker", "embedded", "--listen", f"127.0.0.1:{free_port()}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "kedge.cli.main", "simulate", str(file), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert (found["state"], found["total"], found["reached"], found["failed"]) == ("done", 8, 4, 4)
    assert found["controller"]["cpu_seconds"] > 0


def test_a_second_simulation_on_the_same_broker_is_heard_beside_what_the_first_one_left(
    mosquitto: Mosquitto, tmp_path: Path
) -> None:
    """The broker keeps the reports of the first one's devices, which have the same names."""
    file = tmp_path / "fleet.toml"
    file.write_text(SCENARIO)
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "kedge.cli.main", "simulate", str(file), "--broker", mosquitto.url, "--json"],
            capture_output=True,
            text=True,
            check=True,
            timeout=200,
        )
        found = json.loads(done.stdout)
        assert (found["state"], found["total"], found["reached"], found["failed"]) == ("done", 8, 4, 4)


def test_a_simulation_that_is_killed_takes_its_controller_along(tmp_path: Path) -> None:
    file, state = tmp_path / "fleet.toml", tmp_path / "state"
    file.write_text(SCENARIO.replace("before = 1", "before = 600"))
    arguments = ["--broker", "embedded", "--listen", f"127.0.0.1:{free_port()}", "--state", str(state)]
    with subprocess.Popen([sys.executable, "-m", "kedge.cli.main", "simulate", str(file), *arguments]) as simulation:
        wait_for(lambda: len(_of_state(state) - {simulation.pid}) == 1, what="the controller")
        simulation.kill()
    wait_for(lambda: not _of_state(state), what="the controller's end")


def _of_state(state: Path) -> set[int]:
    """The processes that have this state folder in their command lines."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(state) in (folder / "cmdline").read_text().split("\0"):
                found.add(int(folder.name))
    return found


def test_more_devices_than_the_limit_of_open_files_raise_it_or_are_refused() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        file_descriptors.allow_connections(500)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 756
        if before[1] != resource.RLIM_INFINITY:
            with pytest.raises(ConfigError, match="ulimit"):
                file_descriptors.allow_connections(before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

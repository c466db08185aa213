"""A simulated fleet in real time: real connections to a real broker, and the controller in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.ports import free_port

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

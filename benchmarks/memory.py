"""Memory of an agent that serves: PSS summed over its processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.support.bundles import make_tflite_bundle
from tests.support.field import Field

from benchmarks.harness import ROOT, SHARED, Result
from kedge.demo.processes import Process, ask, command_of, free_port, wait_until

MIB = 1 << 20
# On a device pip has compiled the modules; where this is set each start compiles them anew, in memory.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def run() -> Iterator[Result]:
    """In the device's environment: a LiteRT bundle installed by the fleet, loaded and called over HTTP."""
    model = SHARED / "models" / "ic_resnet8_int8.tflite"
    agent = ROOT / ".venv-device" / "bin" / "kedge-agent"
    if not model.exists():
        print("skipped: memory (the shared data is absent)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        images = np.load(SHARED / "eval" / "ic.npz")["input"]
        release = make_tflite_bundle(folder, model, images)
        port = free_port()
        # The embedded broker is a process of its own here: the field's controller connects to it like to any other.
        (folder / "broker").mkdir()
        broker = Process(
            [command_of("kedge"), "controller", "run", "--embedded", "--listen", f"127.0.0.1:{port}"],
            log=folder / "broker.log",
            env={"KEDGE_FLEET_STATE": str(folder / "fleet")},
        ).start()
        field = Field(folder, f"mqtt://127.0.0.1:{port}")
        try:
            device = field.add("pi", "rpi4", str(agent))
            field.publish(release)
            field.start_rollout("tiny:1.0")
            if set(field.decided().values()) != {"done"}:
                raise SystemExit(f"the rollout failed: {field.reasons()}")
            for _ in range(20):
                device.infer("tiny", "input", images[:1])
            ask(f"{device.door}/v2/models/tiny")
            pids = wait_until("the agent's processes", lambda: _family(device.process.pid), seconds=5)
            parts = {pid: _pss(pid) for pid in pids}
            total = sum(parts.values())
        finally:
            for each in field.devices:
                each.process.stop()
            broker.stop()
    yield Result(
        "memory of an agent that serves",
        f"PSS summed over its {len(parts)} processes ({', '.join(f'{value:.1f}' for value in parts.values())} MiB), "
        "LiteRT bundle loaded and called",
        "MiB",
        total,
        None,
        "",
        "≤60 MiB",
        total <= 60,
    )


def _family(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(status.parent.name))
    found, left = [], [pid]
    while left:
        found.append(left.pop())
        left += children.get(found[-1], [])
    return found


def _pss(pid: int) -> float:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024 / MIB
    raise SystemExit(f"no PSS of process {pid}")

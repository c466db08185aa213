"""Memory of an agent that serves: PSS summed over its processes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.support.bundles import make_bundle, make_tflite_bundle, samples
from tests.support.field import Field

from benchmarks.harness import ROOT, SHARED, Result
from kedge.demo.processes import DemoError, Process, ask, command_of, free_port, wait_until

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
            ask(f"{device.endpoint}/v2/models/tiny")
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
    yield from additions()


def additions() -> Iterator[Result]:
    """In the host's environment: what gRPC adds to a serving process that was called, and Pillow to a process that has
    decoded a picture."""
    with tempfile.TemporaryDirectory() as scratch:
        release = make_bundle(Path(scratch))
        bare, with_grpc = (_served(Path(scratch), release, grpc=grpc) for grpc in (False, True))
    yield Result("memory", "serve, with gRPC and called over it (PSS)", "MiB", with_grpc, bare, "without", "said", True)
    before, after = map(
        float,
        subprocess.run([sys.executable, "-c", _PILLOW], capture_output=True, text=True, check=True).stdout.split(),
    )
    yield Result(
        "memory",
        "numpy and Pillow, a JPEG of 640x480 decoded (PSS)",
        "MiB",
        after,
        before,
        "numpy alone",
        "said",
        True,
    )


_PILLOW = """
import io, numpy as np
def pss():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
before = pss()
from PIL import Image
file = io.BytesIO()
Image.fromarray(np.zeros((480, 640, 3), np.uint8)).save(file, "JPEG")
np.asarray(Image.open(io.BytesIO(file.getvalue())))
print(before, pss())
"""


def _served(folder: Path, release: Path, *, grpc: bool) -> float:
    """PSS of ``kedge-agent serve`` and its serving process after some calls."""
    port, other = free_port(), free_port()
    command = [command_of("kedge-agent"), "serve", str(release), "--listen", f"127.0.0.1:{port}"]
    command += ["--grpc", f"127.0.0.1:{other}"] if grpc else []
    process = Process(command, log=folder / f"serve-{grpc}.log").start()
    try:
        url = f"http://127.0.0.1:{port}/v2/models/tiny"
        wait_until("the server", lambda: _asked(url), seconds=60)
        array = samples(1)
        tensor = {"name": "input", "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
        for _ in range(20):
            ask(f"{url}/infer", {"inputs": [tensor]})
        if grpc:
            from tritonclient.grpc import InferenceServerClient, InferInput

            given = InferInput("input", list(array.shape), "FP32")
            given.set_data_from_numpy(array)
            with InferenceServerClient(f"127.0.0.1:{other}") as client:
                for _ in range(20):
                    client.infer("tiny", [given])
        return sum(_pss(pid) for pid in _family(process.pid))
    finally:
        process.stop()


def served_language_model(release: Path, folder: Path) -> tuple[float, int]:
    """PSS of ``kedge-agent serve`` after an answer of a language model, and the positions that it read and wrote."""
    port = free_port()
    command = [command_of("kedge-agent"), "serve", str(release), "--listen", f"127.0.0.1:{port}"]
    process = Process(command, log=folder / "serve.log").start()
    try:
        url = f"http://127.0.0.1:{port}/v1"
        # It is listed when it is proved and loaded.
        wait_until("the model", lambda: _asked(f"{url}/models/assistant"), seconds=300)
        asked = {"prompt": "The capital of France is", "max_tokens": 32}
        used = ask(f"{url}/completions", {"model": "assistant", **asked})["usage"]
        return sum(_pss(pid) for pid in _family(process.pid)), int(used["total_tokens"])
    finally:
        process.stop()


def _asked(url: str) -> bool:
    try:
        ask(url)
    except DemoError:
        return False
    return True


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

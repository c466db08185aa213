"""One agent's pull of 50 MB against a bare paho pull of the same blocks on one mosquitto, with hash and disk."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.bundles import make_bundle

from benchmarks.harness import BIN, Result, medians, output_of
from kedge.demo.processes import Process, free_port, wait_until
from kedge_protocol import blocks
from kedge_protocol.bundle.layout import Layout

MEBIBYTES = 50
REPEATS = 5


def run() -> Iterator[Result]:
    """Megabytes a second, first request to the last block checked and on the disk."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        print("skipped: pull (mosquitto is not installed)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        release = make_bundle(folder, "big", mebibytes=MEBIBYTES)
        bundle = Layout(release).bundle("generic-cpu")
        layer = bundle.files[bundle.config.entry]
        port = free_port()
        config = folder / "mosquitto.conf"
        config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\n")
        broker = Process([program, "-c", str(config)], log=folder / "mosquitto.log").start()
        try:
            wait_until("mosquitto", lambda: _listens(port), seconds=10)
            rounds = iter(range(100))
            file = Layout(release).blob_path(layer.digest)
            kedge, bare = medians(
                REPEATS,
                lambda: layer.size / 1e6 / _agent(folder / f"agent-{next(rounds)}", port, release, layer.digest),
                lambda: layer.size / 1e6 / _bare(folder, port, file),
            )
        finally:
            broker.stop()
    yield Result(
        "pull of 50 MB",
        "first request to the whole file checked on the disk, one device, mosquitto",
        "MB/s",
        kedge,
        bare,
        "paho alone: the same blocks, window, hash and disk",
        "≥0.5×",
        kedge >= 0.5 * bare,
    )


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _bare(folder: Path, port: int, file: Path) -> float:
    script = Path(__file__).parent / "bare" / "pull.py"
    log = folder / "bare.log"
    log.unlink(missing_ok=True)
    served = Process([str(BIN / "python"), str(script), "serve", str(port), str(file)], log=log).start()
    try:
        wait_until("the bare server", lambda: "ready" in served.tail(), seconds=10)
        count = blocks.block_count(file.stat().st_size)
        taken = float(output_of([BIN / "python", script, "pull", str(port), str(count), folder / "bare.bin"]))
        if hashlib.sha256((folder / "bare.bin").read_bytes()).digest() != hashlib.sha256(file.read_bytes()).digest():
            raise SystemExit("the bare pull brought other bytes")
        return taken
    finally:
        served.stop()


class _Span:
    """From the partial file's appearance (before the first request for a block) to the whole, checked blob."""

    def __init__(self, partial: Path, whole: Path) -> None:
        self._partial, self._whole = partial, whole
        self._taken = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        wait_until("the download's beginning", self._partial.exists, seconds=60, every=0.002)
        start = time.perf_counter()
        wait_until("the download's end", self._whole.exists, seconds=60, every=0.002)
        self._taken = time.perf_counter() - start

    def seconds(self) -> float:
        """Wait for the end."""
        self._thread.join()
        if not self._taken:
            raise SystemExit("the download did not begin or end")
        return self._taken


def _agent(folder: Path, port: int, release: Path, digest: str) -> float:
    """A controller and an agent as processes, with a name of their own: the broker keeps what it retained."""
    folder.mkdir()
    env = {**os.environ, "KEDGE_FLEET_STATE": str(folder / "fleet")}
    kedge = str(BIN / "kedge")
    (folder / "agent.toml").write_text(
        f'[device]\nname = "{folder.name}"\ntarget = "generic-cpu"\n[broker]\nurl = "mqtt://127.0.0.1:{port}"\n'
        '[state]\npath = "state"\n[serve]\nenabled = false\n[telemetry]\ninterval = 0\n'
    )
    for arguments in (["device", "add", folder.name, "--target", "generic-cpu"], ["publish", str(release)]):
        output_of([kedge, *arguments], env=env)
    controller = Process(
        [kedge, "controller", "run", "--broker", f"mqtt://127.0.0.1:{port}"], log=folder / "controller.log", env=env
    ).start()
    agent = Process(
        [str(BIN / "kedge-agent"), "run", "--config", str(folder / "agent.toml")], log=folder / "agent.log"
    ).start()
    try:
        wait_until("the agent", lambda: "online" in output_of([kedge, "device", "list"], env=env), seconds=30)
        hexed = digest.partition(":")[2]
        span = _Span(folder / "state" / "partial" / hexed, folder / "state" / "blobs" / "sha256" / hexed)
        output_of([kedge, "rollout", "start", "big:1.0"], env=env)
        return span.seconds()
    finally:
        agent.stop()
        controller.stop()

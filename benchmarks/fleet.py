"""Fleets of scripted devices on one mosquitto: what the controller costs at rest, in a rollout, and when it is asked.

CPU seconds are the controller's own (and for a rollout also the command's), from the kernel's count, so that neither
the broker nor the devices of the benchmark count. "Lock held" is the longest time in which another process could not
have begun to write to the database while the rollout was begun and ran.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.bundles import make_bundle
from tests.support.scripted_fleet import ScriptedFleet

from benchmarks.harness import Result
from kedge.demo.processes import Process, free_port, wait_until
from kedge.fleet.service import FleetService
from kedge_protocol.bundle.layout import Layout

SIZES = tuple(int(size) for size in os.environ.get("KEDGE_FLEET_SIZES", "100,300,1000,3000").split(","))
EMBEDDED = 100
"""Devices on the embedded broker."""
TELEMETRY_SECONDS = 5.0
IDLE_SECONDS = 20.0
_TICKS = os.sysconf("SC_CLK_TCK")
_KEDGE = (sys.executable, "-m", "kedge.cli.main")


@dataclass(frozen=True)
class Figures:
    """Of one size; seconds, shares of a core, mebibytes."""

    devices: int
    idle_cores: float
    rollout_ms: float
    rollout_seconds: float
    lock_seconds: float
    list_cpu: float
    list_wall: float
    status_cpu: float
    status_wall: float
    rss_mib: float
    database_mib: float


def run() -> Iterator[Result]:
    """All sizes, as a table of their own and as goals."""
    program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
    if program is None:
        print("skipped: fleet (mosquitto is not installed)")
        return
    print(
        "| devices | idle, telemetry every 5 s | rollout, CPU a device | rollout, to the last device | lock held "
        "| `device list`, CPU (wall) | `rollout status`, CPU (wall) | RSS | database |\n|" + "---|" * 9
    )
    for size in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            found = _measure(program, Path(scratch), size)
        print(_row(found, str(found.devices)), flush=True)
        yield from _goals(found)
    with tempfile.TemporaryDirectory() as scratch:
        found = _measure(None, Path(scratch), EMBEDDED)
    # The broker's CPU and memory are the controller's here.
    print(_row(found, f"{found.devices}, embedded broker"), flush=True)


def _row(found: Figures, name: str) -> str:
    cells = (
        name,
        f"{found.idle_cores:.3f} core",
        f"{found.rollout_ms:.1f} ms",
        f"{found.rollout_seconds:.1f} s",
        f"{found.lock_seconds:.2f} s",
        f"{found.list_cpu:.2f} ({found.list_wall:.2f}) s",
        f"{found.status_cpu:.2f} ({found.status_wall:.2f}) s",
        f"{found.rss_mib:.0f} MiB",
        f"{found.database_mib:.1f} MiB",
    )
    return f"| {' | '.join(cells)} |"


def _goals(found: Figures) -> Iterator[Result]:
    name, at = f"fleet of {found.devices}", "scripted devices, mosquitto"
    if found.devices == 3000:
        cores = found.idle_cores
        yield Result(name, f"{at}, telemetry every 5 s", "core", cores, None, "", "≤0.25 core", cores <= 0.25)
        for verb, wall in (("device list", found.list_wall), ("rollout status", found.status_wall)):
            yield Result(name, f"`kedge {verb}`, whole process", "s", wall, None, "", "≤0.5 s", wall <= 0.5)
    if found.devices == 1000:
        spent = found.rollout_ms
        yield Result(name, f"{at}, CPU a device of one rollout", "ms", spent, None, "", "≤5 ms", spent <= 5)


def _measure(program: str | None, folder: Path, size: int) -> Figures:
    """Of one size; ``program`` is mosquitto, None for the embedded broker."""
    state, port = folder / "state", free_port()
    names = [f"dev-{number:05}" for number in range(size)]
    out = make_bundle(folder, target="rpi4", mebibytes=0.25)
    with FleetService(state) as fleet:
        fleet.publish(out)
        for name in names:
            fleet.device_add(name, "rpi4", {"site": f"s{len(name) % 7}"})
    address = ["--embedded", "--listen", f"127.0.0.1:{port}"]
    with contextlib.ExitStack() as running:
        if program is not None:
            address = ["--broker", f"mqtt://127.0.0.1:{port}"]
            running.callback(_mosquitto(program, folder, port).stop)
        command = [*_KEDGE, "controller", "run", "--state", str(state), *address]
        controller = Process(command, log=folder / "controller.log").start()
        running.callback(controller.stop)
        devices = running.enter_context(ScriptedFleet(names, port, telemetry=TELEMETRY_SECONDS))
        wait_until("the fleet", lambda: devices.online() == size, seconds=120, every=0.1)
        wait_until("its presence in the database", lambda: _known(state) == size, seconds=300, every=0.5)
        idle = _idle(controller.pid)
        devices.set_telemetry(0)
        return _rollout(state, size, devices, controller.pid, Layout(out).bundle("rpi4").digest, idle)


def _mosquitto(program: str, folder: Path, port: int) -> Process:
    config = folder / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser root\nmax_queued_messages 10000\n")
    return Process([program, "-c", str(config)], log=folder / "mosquitto.log").start()


def _idle(pid: int) -> float:
    """Cores that the controller uses while nothing but telemetry comes."""
    time.sleep(2 * TELEMETRY_SECONDS)
    spent, since = _cpu(pid), time.monotonic()
    time.sleep(IDLE_SECONDS)
    return (_cpu(pid) - spent) / (time.monotonic() - since)


def _rollout(state: Path, size: int, devices: ScriptedFleet, pid: int, digest: str, idle: float) -> Figures:
    # What waited from the telemetry is none of the rollout's.
    wait_until("a controller at rest", lambda: _rests(pid), seconds=120, every=0.0)
    spent, since = _cpu(pid), time.monotonic()
    with _probe(state / "fleet.db") as held:
        started = _spent("rollout", "start", "tiny:1.0", "--state", str(state))
        wait_until("the devices", lambda: devices.serving("tiny", digest) == size, seconds=400, every=0.05)
        taken = time.monotonic() - since
        wait_until("a controller at rest", lambda: _rests(pid), seconds=120, every=0.0)
    rollout = (_cpu(pid) - spent + started[0]) / size
    listed = _spent("device", "list", "--state", str(state))
    status = _spent("rollout", "status", "--state", str(state))
    return Figures(
        devices=size,
        idle_cores=idle,
        rollout_ms=1000 * rollout,
        rollout_seconds=taken,
        lock_seconds=max(held, default=0.0),
        list_cpu=listed[0],
        list_wall=listed[1],
        status_cpu=status[0],
        status_wall=status[1],
        rss_mib=_resident(pid) / 1024,
        database_mib=sum(file.stat().st_size for file in state.glob("fleet.db*")) / (1 << 20),
    )


def _known(state: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{state / 'fleet.db'}?mode=ro", uri=True)) as connection:
        return int(connection.execute("SELECT count(*) FROM device_state WHERE online").fetchone()[0])


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _resident(pid: int) -> int:
    """KiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def _rests(pid: int) -> bool:
    """Whether it used less than a fifteenth of a core in the last second."""
    before = _cpu(pid)
    time.sleep(1.0)
    return _cpu(pid) - before < 0.07


def _spent(*arguments: str) -> tuple[float, float]:
    """CPU and wall seconds of one command, process start to end; the better of two where nothing is changed by it."""
    taken = []
    for _ in range(1 if "start" in arguments else 2):
        before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        done = subprocess.run([*_KEDGE, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"kedge {' '.join(arguments)}\n{done.stderr}")
        wall = time.monotonic() - since
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall))
    return min(taken)


@contextlib.contextmanager
def _probe(database: Path) -> Iterator[list[float]]:
    """Try all the time to begin to write; how long it could not, each time."""
    held: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        with contextlib.closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
            since: float | None = None
            while not stop.wait(0.002):
                free = _free(lambda: connection.execute("BEGIN IMMEDIATE").connection.rollback())
                if free and since is not None:
                    held.append(time.monotonic() - since)
                since = None if free else since or time.monotonic()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        stop.set()
        thread.join()


def _free(begin: Callable[[], None]) -> bool:
    try:
        begin()
    except sqlite3.OperationalError:
        return False
    return True

"""Tasks that the worker's tests run in real children."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol import errors
from kedge_targets.worker import Progress, Worker


@dataclass(frozen=True)
class Ask:
    text: str = ""
    number: float = 0.0
    path: Path | None = None
    items: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    text: str
    pid: int
    number: float = 0.0
    items: dict[str, list[int]] = field(default_factory=dict)


def echo(request: Ask, progress: Progress) -> Told:
    print(f"echo of {request.text}")
    for step in range(3):
        progress("echoing", step + 1, 3)
    return Told(request.text, os.getpid(), request.number, request.items)


def environment(request: Ask, progress: Progress) -> Told:
    return Told(os.environ.get(request.text, ""), os.getpid())


def first_to_go(request: Ask, progress: Progress) -> Told:
    return Told("", os.getpid(), float(Path("/proc/self/oom_score_adj").read_text()))


def sleep(request: Ask, progress: Progress) -> Told:
    """Sleeps with a child of its own, whose id goes to ``path``."""
    inner = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({request.number})"])
    if request.path is not None:
        request.path.write_text(f"{os.getpid()} {inner.pid}")
    progress("sleeping", 0, 1)
    time.sleep(request.number)
    return Told("awake", os.getpid())


def eat(request: Ask, progress: Progress) -> Told:
    """Takes memory, 16 MiB a step, up to ``number`` bytes."""
    held = []
    while sum(map(len, held)) < request.number:
        held.append(b"\1" * (16 << 20))
        time.sleep(0.02)
    return Told("full", os.getpid())


def eat_in_a_child(request: Ask, progress: Progress) -> Told:
    subprocess.run([sys.executable, "-c", f"b = b'1' * {int(request.number)}; import time; time.sleep(60)"], check=True)
    return Told("full", os.getpid())


def crash(request: Ask, progress: Progress) -> Told:
    print("about to read address 0", flush=True)
    ctypes.string_at(0)
    return Told("alive", os.getpid())


def kill_itself(request: Ask, progress: Progress) -> Told:
    os.kill(os.getpid(), signal.SIGKILL)
    return Told("alive", os.getpid())


def leave(request: Ask, progress: Progress) -> Told:
    os._exit(7)


def leave_politely(request: Ask, progress: Progress) -> Told:
    sys.exit("a vendor's idea of an error")


def refuse(request: Ask, progress: Progress) -> Told:
    kind: type[errors.KedgeError] = getattr(errors, request.text)
    raise kind("the node is odd", where="node 'x'", remedy="Leave it out")


def stumble(request: Ask, progress: Progress) -> Told:
    print("last words of the vendor")
    raise ValueError(request.text)


def nested(request: Ask, progress: Progress) -> Told:
    """Starts a worker of its own and waits in it."""
    with Worker(name="inner") as worker:
        return worker.call("tests.support.worker_tasks:sleep", request, Told, deadline=60.0)

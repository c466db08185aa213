"""How long the page, its JSON routes and the commands take to look at fleets of several sizes.

The fleet is one that works: seven targets at ten sites, twenty plain rollouts and one in waves whose gates have judged,
a shadow on every device, a request for samples, sketches of drift, and telemetry. Devices are scripted; the database,
the inbox, the engine, the page's server and the commands are the real ones. Every route that answers ``GET`` is asked,
as the application itself lists them.

``KEDGE_PAGE_SIZES`` sets the fleets (200,1000,2000), ``KEDGE_PAGE_TELEMETRY`` the messages of each device (20).
"""

from __future__ import annotations

import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastapi.routing import APIRoute
from tests.support.drawn_sketches import STREAM
from tests.support.pages import Page
from tests.support.staged_fleet import StagedFleet, labels, layouts

from benchmarks.harness import Result
from kedge.fleet import drift, samples, shadows
from kedge.fleet.service import FleetService
from kedge.fleet.staged import policy as policies
from kedge.page import input_views, views
from kedge.page.options import PageAddress
from kedge.page.server import application, serving
from kedge_protocol import codec, topics
from kedge_protocol.drift import Kind, Statistic
from kedge_protocol.latency_buckets import BUCKETS
from kedge_protocol.messages import ModelTelemetry, ShadowTelemetry, Telemetry
from kedge_protocol.samples import Choice

SIZES = tuple(int(size) for size in os.environ.get("KEDGE_PAGE_SIZES", "200,1000,2000").split(","))
TELEMETRY = int(os.environ.get("KEDGE_PAGE_TELEMETRY", "20"))
SHARES = {
    "rpi4": 0.35, "rpi5": 0.2, "jetson-orin-nano": 0.15, "generic-cpu": 0.125, "intel-cpu": 0.1, "kria-kv260": 0.05,
    "ncs2": 0.025,
}  # fmt: skip
SITES = 10
ROLLOUTS = 20
POLICY = {"waves": ["10%", "100%"], "soak": "30m"}
SECONDS = 0.5
"""The goal of each."""
REPEATS = 5
_STREAMS = tuple(
    replace(STREAM, kind=kind, statistic=statistic)
    for kind, statistic in (
        (Kind.INPUT, Statistic.MEAN),
        (Kind.INPUT, Statistic.SPREAD),
        (Kind.OUTPUT, Statistic.CLASS),
    )
)
_KEDGE = (sys.executable, "-m", "kedge.cli.main")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
"""Of the commands: an installed Kedge is not compiled anew at each start."""


@dataclass(frozen=True)
class Taken:
    """Of one route or command: seconds of processor and of the clock, medians; and bytes of the answer."""

    cpu: float
    wall: float
    size: int


def run() -> Iterator[Result]:
    """All sizes, as a table of their own and as goals for the largest."""
    found: dict[int, dict[str, Taken]] = {}
    for size in SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            began = time.process_time()
            state = _fill(Path(scratch), size)
            print(f"made {size} devices in {time.process_time() - began:.0f} CPU s", file=sys.stderr, flush=True)
            found[size] = {**_pages(state), **_commands(state)}
    print(f"| | {' | '.join(f'{size}: CPU (wall)' for size in SIZES)} | bytes |\n|{'---|' * (len(SIZES) + 2)}")
    for name in found[SIZES[-1]]:
        cells = [f"{found[size][name].cpu:.3f} ({found[size][name].wall:.3f}) s" for size in SIZES]
        print(f"| {name} | {' | '.join(cells)} | {found[SIZES[-1]][name].size} |")
    largest = SIZES[-1]
    for name, taken in found[largest].items():
        spent = taken.cpu
        yield Result(f"{largest} devices", name, "CPU s", spent, None, "", f"≤{SECONDS} s", spent <= SECONDS)


def _fill(folder: Path, size: int) -> Path:
    """The state folder of a fleet that has been at work for a while."""
    with StagedFleet(folder, layouts(folder, SHARES)) as fleet:
        for target, share in SHARES.items():
            for site in range(SITES):
                fleet.add(
                    round(size * share / SITES), target, prefix=f"{target}-s{site}", labels=labels(site=f"s{site}")
                )
        fleet.settle("1.0")
        for number in range(ROLLOUTS):
            fleet.service.rollout_start("tiny:1.0", {"site": f"s{number % SITES}"})
            fleet.step(2)
        with fleet.service.database.write() as session:
            session.run("UPDATE bundle SET drift = ?", (drift.document(_STREAMS),))
        fleet.service.rollout_start("tiny:2.0", policy=policies.parse(POLICY))
        fleet.until("soaking")
        shadows.start(fleet.service, "tiny:3.0", {})
        samples.request(fleet.service, "tiny", Choice.LOW_CONFIDENCE, 1000)
        for turn in range(TELEMETRY):
            for name, device in fleet.devices.items():
                message = _telemetry(turn, device.serving or "", fleet.digest("3.0", device.target), name)
                fleet.hear(topics.telemetry(name, "metrics"), codec.encode(message))
            fleet.step(60, every=60)
        return folder / "state"


def _telemetry(turn: int, serving: str, shadow: str, name: str) -> Telemetry:
    """What a device sends: a histogram of some width, sketches, and what its shadow answered."""
    first = BUCKETS // 3 + hash((name, turn)) % 7
    compared = ShadowTelemetry(
        digest=shadow, compared=50, agreed=49, classes={str(one): (5, 5 - (one == 3)) for one in range(10)},
        old_buckets={str(first + one): 5 for one in range(10)}, new_buckets={str(first + one): 5 for one in range(10)},
    )  # fmt: skip
    model = ModelTelemetry(
        digest=serving, inferences=500, errors=1, inferences_total=500 * turn, errors_total=turn,
        latency_ms={"p50": 10.0, "p95": 14.0, "p99": 16.0, "mean": 11.0},
        latency_buckets={str(first + one): 50 for one in range(10)}, memory_bytes=100 << 20, shadow=compared,
        drift={stream.name: (5,) * len(stream.counts) for stream in _STREAMS},
    )  # fmt: skip
    return Telemetry(
        boot_id=f"boot-{name}", seq=turn + 1, interval=60.0, models={"tiny": model}, cpu_percent=12.0,
        memory_total_bytes=1 << 30, memory_available_bytes=1 << 29, agent_bytes=1 << 24, free_bytes=1 << 30,
        temperature_c=50.0,
    )  # fmt: skip


def _pages(state: Path) -> dict[str, Taken]:
    """Every route that answers GET, and the dry run."""
    address = PageAddress(host="127.0.0.1", port=0, tokens={})
    found: dict[str, Taken] = {}
    with FleetService(state) as fleet:
        device = fleet.device_list(limit=1).devices[0].name
        given = {"name": device, "number": str(fleet.rollouts(limit=1)[0].id)}
        described = application(fleet, address).openapi()["paths"]
        paths = [path for path, verbs in described.items() if "get" in verbs] + ["/metrics"]
        pages = (*views.router.routes, *input_views.router.routes)
        paths += [route.path for route in pages if isinstance(route, APIRoute)]
    with serving(state, address) as url:
        page = Page(url)
        for path in sorted(paths):
            found[f"GET {path}"] = _best(partial(_ask, page, "GET", _filled(path, given)))
        plan = "/api/v1/rollout-plans"
        found[f"POST {plan}"] = _best(partial(_ask, page, "POST", plan, {"release": "tiny:2.0", "policy": POLICY}))
    return found


def _filled(path: str, given: dict[str, str]) -> str:
    if "/releases/" in path:
        return path.replace("{name}", "tiny").replace("{version}", "1.0")
    if "/samples/" in path:
        return path.replace("{number}", "1")
    return re.sub(r"\{(\w+)\}", lambda match: given[match[1]], path)


def _ask(page: Page, method: str, path: str, body: object = None) -> int:
    status, _, content = page.ask(method, path, body)
    if status >= 400 and "report" not in path and "health" not in path:
        sys.exit(f"{method} {path}: {status} {content[:300]!r}")
    return len(content)


def _best(ask: Callable[[], int]) -> Taken:
    cpu, wall, size = [], [], 0
    for _ in range(REPEATS):
        spent, since = time.process_time(), time.monotonic()
        size = ask()
        cpu.append(time.process_time() - spent)
        wall.append(time.monotonic() - since)
    return Taken(statistics.median(cpu), statistics.median(wall), size)


def _commands(state: Path) -> dict[str, Taken]:
    """Every command that only looks, as processes from start to end."""
    with FleetService(state) as fleet:
        device = fleet.device_list(limit=1).devices[0].name
    asked = (
        ("device", "list"), ("device", "list", "--json"), ("device", "show", device), ("device", "latencies"),
        ("release", "list"), ("rollout", "list"), ("rollout", "status"), ("rollout", "status", "--json"),
        ("rollout", "start", "tiny:2.0", "--waves", "10%,100%", "--dry-run"), ("shadow", "show"), ("samples", "show"),
        ("samples", "show", "1"), ("drift",), ("drift", "--by", "site"), ("audit", "list"), ("audit", "verify"),
        ("keys", "show"),
    )  # fmt: skip
    return {f"`kedge {' '.join(one).replace(device, 'NAME')}`": _process(one, state) for one in asked}


def _process(arguments: tuple[str, ...], state: Path) -> Taken:
    cpu, wall, size = [], [], 0
    for _ in range(3):
        before, since = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        asked = [*_KEDGE, *arguments, "--state", str(state)]
        done = subprocess.run(asked, capture_output=True, check=False, env=_ENVIRONMENT)
        if done.returncode:
            sys.exit(f"kedge {' '.join(arguments)}\n{done.stderr.decode()}")
        wall.append(time.monotonic() - since)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        size = len(done.stdout)
    return Taken(statistics.median(cpu), statistics.median(wall), size)

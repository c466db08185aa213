"""``make demo ARGS=fleet``: two hundred simulated devices on the embedded broker; a good release, then a bad one."""

from __future__ import annotations

import contextlib
import time
from typing import Any

from kedge.demo.processes import DemoError, free_port, say
from kedge.simulator import scenario as scenarios
from kedge.simulator.live import EMBEDDED, running
from kedge.simulator.result import SimulationResult

DEVICES = {
    "rpi4": 60,
    "rpi5": 40,
    "jetson-orin-nano": 30,
    "generic-cpu": 30,
    "intel-cpu": 20,
    "kria-kv260": 10,
    "ncs2": 10,
}
"""Target → devices."""
_COMMON: dict[str, Any] = {
    "before": 30,
    "telemetry": 10,
    "limit": 1200,
    "reports": 0,
    "runtime": {"calls_per_minute": 600, "prove_seconds": 2},
    # The gate on memory wants six minutes of each wave.
    "rollout": {"waves": ["20%", "100%"], "soak": "60s", "gates": {"off": ["memory_per_minute"]}},
}
_BAD = {"targets": ["rpi5"], "errors": 0.25}


def show_fleet(*, devices: dict[str, int] | None = None, keep: bool = False) -> None:
    """Roll a good release and a bad one out to simulated fleets.

    Args:
        devices: target → number; :data:`DEVICES` by default.
        keep: leave the second fleet running until Ctrl-C.

    Raises:
        KedgeError: a step failed, or a rollout did not end as it should.
    """
    fleet = [{"target": target, "count": count} for target, count in (devices or DEVICES).items()]
    page = f"127.0.0.1:{free_port()}"
    say(f"The page: http://{page}/ (it is there while a fleet runs)\n")
    good = {**_COMMON, "fleet": fleet, "old": {"version": "1.0"}, "new": {"version": "2.0"}}
    found = _show("A good release, 2.0", scenarios.parse(good), page, keep=False)
    if (found.state, found.reached) != ("done", found.total):
        raise DemoError(f"the good release did not reach every device: {found.state} {found.reason}")
    bad = {**_COMMON, "fleet": fleet, "old": {"version": "2.0"}, "new": {"version": "3.0", "defects": [_BAD]}}
    found = _show("A bad release, 3.0: a quarter of the calls fail on rpi5", scenarios.parse(bad), page, keep=keep)
    if (found.state, found.reverted) != ("aborted", found.reached):
        raise DemoError(f"the bad release was not stopped and taken back: {found.state} {found.reason}")


def _show(words: str, scenario: scenarios.Scenario, page: str, *, keep: bool) -> SimulationResult:
    say(f"== {words} ==")
    say(f"   {scenario.total} devices come to the broker …")
    with running(scenario, EMBEDDED, listen=f"127.0.0.1:{free_port()}", page=page) as (live, fleet, controller):
        found = live.run(fleet, controller, lambda: say(f"   the rollout begins: http://{page}/"))
        counts = f"{found.reached} devices reached, {found.reverted} taken back"
        say(f"   {found.state} after {found.seconds:.0f} s: {counts}")
        if found.reason:
            say(f"   {found.reason}")
        if found.controller is not None:
            cost = found.controller
            say(f"   the controller took {cost.cpu_seconds:.1f} CPU s and {cost.peak_bytes / 2**20:.0f} MiB\n")
        if keep:
            say("All is left running. To end it: Ctrl-C")
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    time.sleep(1.0)
    return found

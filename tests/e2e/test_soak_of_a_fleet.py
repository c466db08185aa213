"""A fleet of scripted devices under rollouts, while controller and broker are killed at random: a minute in
``make test``, ten in ``make campaign``."""

from __future__ import annotations

import random
import re
import resource
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.brokers import Mosquitto
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.scripted_fleet import ScriptedFleet
from tests.support.waiting import wait_for

from kedge.fleet.service import FleetService
from kedge_protocol.bundle.layout import Layout

SEED = 12
_LOGGED = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b[: ]*(.*)")
_VARYING = re.compile(r"sha256:[0-9a-f]+|0x[0-9a-f]+|soak-\d+|\d+(\.\d+)?")


@dataclass(frozen=True)
class Soak:
    """How long, and how much: devices, seconds, seconds between two deeds (at least, at most)."""

    devices: int
    seconds: float
    pause: tuple[float, float]
    settle: float


def allowed(kills: int) -> dict[str, int]:
    """Log lines of WARNING and above that may stand in the controller's log: pattern → how often.

    Args:
        kills: of broker or controller. A connection that is gone is said once for each attempt, and attempts double
            their distance.
    """
    return {r"^kedge_protocol.mqtt: no connection to ": 8 * kills}


@pytest.mark.needs("mosquitto")
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "soak",
    [
        pytest.param(Soak(devices=100, seconds=45, pause=(1, 6), settle=200), id="a minute"),
        pytest.param(
            Soak(devices=1000, seconds=600, pause=(5, 40), settle=200), id="ten minutes", marks=pytest.mark.campaign
        ),
    ],
)
def test_whatever_is_killed_every_device_ends_on_what_the_database_wants(tmp_path: Path, soak: Soak) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    names = [f"soak-{number:04}" for number in range(soak.devices)]
    with FleetService(tmp_path / "state") as fleet:
        digests = dict(releases(tmp_path, fleet))
        for number, name in enumerate(names):
            fleet.device_add(name, "rpi4", {"half": "ab"[number % 2]})
        broker = Mosquitto(tmp_path)
        broker.start()
        with (
            ControllerProcess(fleet.state, "--broker", broker.url) as controller,
            ScriptedFleet(names, broker.port, telemetry=5.0) as devices,
        ):
            controller.start()
            kills = shaken(fleet, broker, controller, soak)
            # The last word: each half of the fleet on a version of its own.
            last = [
                fleet.rollout_start(f"tiny:{version}", {"half": half}).rollout.id
                for half, version in (("a", "2.0"), ("b", "3.0"))
            ]
            wanted = {one.device: one.digest for rollout in last for one in fleet.rollout_status(rollout).devices}
            assert sorted(wanted) == names
            assert set(wanted.values()) == {digests["2.0"], digests["3.0"]}
            wait_for(
                lambda: {name: one.serving.get("tiny") for name, one in devices.devices.items()} == wanted,
                timeout=soak.settle,
                what="the fleet serving what the database wants",
            )
            for rollout in last:
                wait_for(
                    lambda one=rollout: fleet.rollout_status(one).done, timeout=soak.settle, what="the rollout's end"
                )
            assert devices.loop.problem is None
            assert controller.running
        broker.kill()
        logged = warnings_of(controller.text())
        surprises = {
            line: count
            for line, count in logged.items()
            if count > next((most for text, most in allowed(kills).items() if re.search(text, line)), 0)
        }
        assert not surprises, f"after {kills} kills (seed {SEED}): {surprises}"


def releases(folder: Path, fleet: FleetService) -> Iterator[tuple[str, str]]:
    """Publish three versions: version → digest of the bundle."""
    for version, seed in (("1.0", 1), ("2.0", 2), ("3.0", 3)):
        layout = make_bundle(folder / version, target="rpi4", version=version, seed=seed, mebibytes=0.1)
        fleet.publish(layout)
        yield version, Layout(layout).bundle("rpi4").digest


def shaken(fleet: FleetService, broker: Mosquitto, controller: ControllerProcess, soak: Soak) -> int:
    """Roll out and kill by turns until the time is over; both run in the end. Returns the number of kills."""
    source = random.Random(SEED)
    until, kills = time.monotonic() + soak.seconds, 0
    fleet.rollout_start("tiny:1.0")
    while time.monotonic() < until:
        time.sleep(min(source.uniform(*soak.pause), max(0.0, until - time.monotonic())))
        deed = source.choice(("broker", "controller", "both", "rollout", "rollout", "revert"))
        if deed in ("broker", "both"):
            broker.kill()
        if deed in ("controller", "both"):
            controller.kill()
        if deed in ("broker", "controller", "both"):
            kills += 1
            time.sleep(source.uniform(0, 2))
        if deed in ("broker", "both"):
            broker.start()
        if deed in ("controller", "both"):
            controller.start(connected=False)
        if deed == "rollout":
            fleet.rollout_start(f"tiny:{source.choice(('1.0', '2.0', '3.0'))}")
        if deed == "revert":
            fleet.rollout_revert()
    return kills


def warnings_of(text: str) -> Counter[str]:
    """Lines of WARNING and above, by message without its numbers and names."""
    found: Counter[str] = Counter()
    for line in text.splitlines():
        if match := _LOGGED.search(line):
            found[_VARYING.sub("#", match[2])] += 1
        elif line.startswith("Traceback"):
            found[line] += 1
    return found

"""The controller's clock may be set while a rollout goes on."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

from tests.support.bundles import make_bundle

from kedge.fleet.controller import Controller
from kedge.fleet.service import FleetService
from kedge.fleet.staged.policy import Policy
from kedge.simulator.bus import Bus, Line, VirtualConnection
from kedge.simulator.clock import VirtualClock
from kedge_protocol.broker import Broker


def test_a_clock_that_is_set_forward_makes_no_device_silent(tmp_path: Path) -> None:
    virtual, set_by = VirtualClock(), [0.0]

    def wall() -> float:
        return virtual.wall() + set_by[0]

    bus = Bus(virtual, random.Random(0))
    connect = partial(VirtualConnection, bus, Line(lambda: False))
    with (
        FleetService(tmp_path, clock=wall) as fleet,
        Controller(
            tmp_path,
            Broker(host="virtual", port=1883),
            clock=wall,
            steady=virtual.steady,
            connect=connect,
            block_thread=False,
        ) as controller,
    ):
        fleet.publish(make_bundle(tmp_path / "layouts", target="rpi4"))
        fleet.device_add("a", "rpi4")
        fleet.rollout_start("tiny:1.0", policy=Policy(progress_timeout=100.0))
        controller.start()

        def after(seconds: float) -> dict[str, int]:
            until = virtual.now + seconds
            while virtual.now < until:
                virtual.run(virtual.now + 1.0, lambda: False)
                controller.tick()
            stage = fleet.rollout_status().stage
            assert stage is not None
            return stage.steps

        assert after(20) == {"updating": 1}
        # A controller whose clock stood at another day before it heard of the time.
        set_by[0] = 50_000.0
        assert after(80) == {"updating": 1}
        assert after(40) == {"silent": 1}

"""Downloads over links that carry little: nothing is sent twice, and nothing waits long behind a block."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path

import pytest
from tests.support.update_world import World, make_release, serving

from kedge_agent.update.flow_control import FlowControl
from kedge_agent.update.settings import Settings
from kedge_protocol.blocks import BLOCK_SIZE
from kedge_protocol.messages import ModelState
from kedge_protocol.mqtt import KEEPALIVE

pytestmark = pytest.mark.device


class SlowLink:
    """The device's way to the broker, one message after the other; signs of life queue with the blocks, and a
    connection whose sign of life is not answered in time is given up with all that is under way."""

    def __init__(self, world: World, bytes_per_second: float) -> None:
        self.world = world
        self.rate = bytes_per_second
        self.sent = 0
        self.lost = 0
        self._queue: deque[int | None] = deque()
        self._carried = 0.0
        self._pinged_at: float | None = None
        self._next_ping = world.now + KEEPALIVE

    def run(self, seconds: float) -> None:
        end = self.world.now + seconds
        while self.world.now < end and not self.world.machine.settled:
            self.world.run_disk()
            self.world.prover.run_one()
            while self.world.serve_request():
                pass
            self._queue += [len(answer.payload) for _, answer in self.world.answers[self._queued() :]]
            self.world.tick(0.25)
            self._carry()
            self._keep_alive()

    def _queued(self) -> int:
        return sum(size is not None for size in self._queue)

    def _carry(self) -> None:
        self._carried += 0.25 * self.rate
        while self._queue:
            size = self._queue[0] or 0
            if size > self._carried:
                return
            self._carried -= size
            if self._queue.popleft() is None:
                self._pinged_at = None
            else:
                self.sent += size
                self.world.deliver()
        self._carried = 0.0

    def _keep_alive(self) -> None:
        now = self.world.now
        if self._pinged_at is not None and now - self._pinged_at > KEEPALIVE:
            self.lost += 1
            # What was in the queue had been sent by the broker already.
            self.sent += sum(size or 0 for size in self._queue)
            self._queue.clear()
            self._pinged_at = None
            self.world.disconnect()
            self.world.connect()
        elif self._pinged_at is None and now >= self._next_ping:
            self._next_ping = now + KEEPALIVE
            self._pinged_at = now
            self._queue.append(None)


@pytest.mark.parametrize("kilobytes", [8, 16, 64, 1000])
def test_a_download_over_a_slow_link_costs_its_bytes_and_loses_no_connection(tmp_path: Path, kilobytes: int) -> None:
    world = World(tmp_path / "state", settings=Settings(window=16, reserve_bytes=0, disk_deadline=86400.0))
    data = random.Random(1).randbytes(1_200_000)
    release = world.controller.add(make_release({"model.bin": data}))
    world.connect()
    world.desire(1, release)
    link = SlowLink(world, kilobytes * 1000)
    began = world.now
    link.run(1000)
    world.settle()
    serving(world, release)
    assert link.lost == 0
    assert link.sent <= 1.1 * len(data)
    # Nearly all the time the link is busy.
    assert world.now - began < 1.5 * len(data) / (kilobytes * 1000) + 15
    assert abs(world.models["digits"].bytes_received - link.sent) < 1


def test_the_window_follows_the_link() -> None:
    pace, now = FlowControl(16), 0.0
    for _ in range(20):
        pace.arrived(now, now + 0.05)
    assert pace.window == 16
    # Sixteen blocks at 16 KB/s: the first are asked for and come late; one shrinking is enough for all of them.
    for block in range(1, 17):
        pace.arrived(0.0, 4.0 * block)
    assert 1 <= pace.window <= 12
    assert pace.patience(20.0) == 256.0
    for _ in range(50):
        now += 100.0
        pace.arrived(now, now + 4.1 * pace.window)
    assert pace.window == 1
    pace.lost(now)
    assert pace.window == 1


def test_what_was_received_is_counted_over_a_restart(tmp_path: Path) -> None:
    world = World(tmp_path / "state", settings=Settings(window=4, reserve_bytes=0))
    release = world.controller.add(make_release({"model.bin": random.Random(1).randbytes(40 * BLOCK_SIZE)}))
    world.connect()
    world.desire(1, release)
    while world.models["digits"].blocks_done < 20:
        if not (world.disk.run_one() or world.serve_request() or world.deliver()):
            world.tick(0.1)
        world.now += 1.0
    world.run_disk()
    world.crash()
    world.connect()
    world.settle()
    assert 35 * BLOCK_SIZE < world.models["digits"].bytes_received < 42 * BLOCK_SIZE


def test_a_broker_that_drops_whole_blocks_is_named_and_reported(tmp_path: Path) -> None:
    world = World(tmp_path / "state")
    release = world.controller.add(make_release({"model.bin": random.Random(1).randbytes(5 * BLOCK_SIZE)}))
    world.connect()
    world.desire(1, release)
    reports = 0
    for _ in range(300):
        world.run_disk()
        while world.serve_request():
            pass
        world.answers = [one for one in world.answers if len(one[1].payload) < BLOCK_SIZE]
        while world.deliver():
            pass
        before = world.models["digits"].detail
        world.tick(1.0)
        reports += before != world.models["digits"].detail
    model = world.models["digits"]
    assert model.state is ModelState.WAITING
    assert "message_size_limit" in (model.detail or "")
    assert world.reports >= reports
    # The limit is raised: no new rollout is needed.
    world.settle()
    serving(world, release)

"""The block server over a real broker: right bytes, right refusals, turns, and counts that outlive a kill."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import iter_hashes, make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.scripted_agent import ScriptedAgent
from tests.support.waiting import wait_for

from kedge.fleet.fair_queue import MAX_WAITING
from kedge.fleet.service import FleetService
from kedge_protocol import digest
from kedge_protocol.blocks import BLOCK_SIZE, BlockStatus, block_count, block_hash
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_protocol.messages import BlobKind

__all__ = ["mosquitto"]

pytestmark = pytest.mark.needs("mosquitto")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return Layout(make_bundle(tmp_path_factory.mktemp("made"), target="rpi4", mebibytes=20))


@pytest.fixture(scope="module")
def bundle(layout: Layout) -> Bundle:
    return layout.bundle("rpi4")


@pytest.fixture
def fleet(tmp_path: Path, layout: Layout) -> Iterator[FleetService]:
    with FleetService(tmp_path / "state") as made:
        made.publish(layout.path)
        made.device_add("pi", "rpi4")
        made.device_add("other", "rpi4")
        made.rollout_start("tiny:1.0")
        yield made


@pytest.fixture
def controller(fleet: FleetService, mosquitto: Mosquitto) -> Iterator[ControllerProcess]:
    with ControllerProcess(fleet.state, "--broker", mosquitto.url) as running:
        running.start()
        yield running


def counts(fleet: FleetService, device: str, blob: str, kind: str = "blob") -> tuple[int, int, int]:
    for view in fleet.transfers(device):
        if (view.digest, view.kind) == (blob, kind):
            return view.blocks_served, view.blocks_distinct, view.finished_served_again
    return 0, 0, 0


def test_every_blob_of_a_bundle_can_be_pulled_with_its_map(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    sizes = {layer.digest: layer.size for layer in bundle.manifest.layers}
    sizes[bundle.digest] = len(bundle.raw)
    sizes[bundle.manifest.config.digest] = bundle.manifest.config.size
    with ScriptedAgent("pi", mosquitto.port) as agent:
        for blob, size in sizes.items():
            count = block_count(size)
            if count > 1:
                maps = block_count(32 * count)
                hashes = list(iter_hashes(agent.fetch(blob, range(maps), kind=BlobKind.MAP)))
                assert len(hashes) == count
            data = b"".join(agent.fetch(blob, range(at, min(at + 64, count))) for at in range(0, count, 64))
            digest.verify_bytes(data, blob, where="pulled")
            if count > 1:
                assert [block_hash(data[at : at + BLOCK_SIZE]) for at in range(0, size, BLOCK_SIZE)] == hashes
    for blob, size in sizes.items():
        wait_for(lambda blob=blob, size=size: counts(fleet, "pi", blob) == (block_count(size),) * 2 + (0,))
    detail = fleet.device("pi")
    assert sum(view.bytes_served for view in detail.transfers if view.kind == "blob") == sum(sizes.values())
    assert fleet.transfers("other") == ()


def test_what_cannot_be_served_is_refused_in_words(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    model = bundle.files["model.onnx"]
    count = block_count(model.size)
    small = bundle.digest
    cases = {
        ("sha256:" + "0" * 64, (0, 1), BlobKind.BLOB): BlockStatus.NOT_FOUND,
        ("../../etc/passwd", (0,), BlobKind.BLOB): BlockStatus.NOT_FOUND,
        (model.digest, (count,), BlobKind.BLOB): BlockStatus.REFUSED,
        (model.digest, (0,) * 257, BlobKind.BLOB): BlockStatus.REFUSED,
        (model.digest, (1,), BlobKind.MAP): BlockStatus.REFUSED,
        (small, (0,), BlobKind.MAP): BlockStatus.REFUSED,
    }
    with ScriptedAgent("pi", mosquitto.port) as agent:
        for (blob, indices, kind), status in cases.items():
            rid = agent.ask(blob, indices, kind=kind)
            expected = min(len(indices), 256)
            wait_for(lambda rid=rid, expected=expected: sum(one == rid for one, _ in agent.answers) == expected)
            for one, answer in agent.answers:
                if one == rid:
                    assert answer.status is status
                    assert answer.reason
        agent.ask(model.digest, (-1,))
        assert agent.fetch(model.digest, [count - 1])
    assert counts(fleet, "pi", model.digest)[0] <= 1


def test_a_line_that_is_full_is_busy_and_one_device_does_not_starve_another(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    model = bundle.files["model.onnx"].digest
    count = block_count(bundle.files["model.onnx"].size)
    assert count > MAX_WAITING
    with ScriptedAgent("pi", mosquitto.port) as greedy, ScriptedAgent("other", mosquitto.port) as modest:
        modest.fetch(model, [0])
        for start in range(0, count, 64):
            greedy.ask(model, range(start, min(start + 64, count)))
        modest.fetch(model, range(1, 9))
        wait_for(lambda: len(greedy.answers) >= count)
        refused = [answer for _, answer in greedy.answers if answer.status is not BlockStatus.OK]
        assert all(answer.status is BlockStatus.BUSY for answer in refused)


def test_the_count_sees_a_finished_block_served_again_and_only_that(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    model = bundle.files["model.onnx"].digest
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.fetch(model, range(10))
        # Lost on the way, so asked for again: not finished.
        agent.fetch(model, [3], have=[0, 1, 2])
        wait_for(lambda: counts(fleet, "pi", model) == (11, 10, 0))
        agent.fetch(model, [4, 5], have=[4])
        agent.fetch(model, [0])
        wait_for(lambda: counts(fleet, "pi", model) == (14, 10, 2))


def test_the_count_outlives_a_killed_controller(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    model = bundle.files["model.onnx"].digest
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.fetch(model, range(20))
        agent.fetch(model, [20], have=range(20))
        wait_for(lambda: counts(fleet, "pi", model) == (21, 21, 0))
        controller.kill()
        controller.start()
        wait_for(lambda: len({status.boot_id for status in agent.statuses if status.online}) == 2)
        agent.fetch(model, range(19, 25), have=[])
        # 19 was told to be finished before the kill, by a controller that is no more.
        wait_for(lambda: counts(fleet, "pi", model) == (27, 25, 1))


def test_a_pull_goes_on_after_the_broker_was_killed_and_no_finished_block_comes_twice(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    model = bundle.files["model.onnx"]
    count = block_count(model.size)

    def have(agent: ScriptedAgent) -> set[int]:
        return {index for (blob, _, index) in agent.blocks if blob == model.digest}

    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.client.reconnect_delay_set(1, 1)
        for start in range(0, count // 2, 32):
            agent.fetch(model.digest, range(start, min(start + 32, count // 2)), have=have(agent))
        agent.ask(model.digest, range(count // 2, count // 2 + 64), have=have(agent))
        mosquitto.kill()
        seen = len(agent.statuses)
        mosquitto.start()
        wait_for(lambda: any(status.online for status in agent.statuses[seen:]))
        while missing := sorted(set(range(count)) - have(agent)):
            agent.fetch(model.digest, missing[:64], have=have(agent))
        data = b"".join(agent.blocks[model.digest, BlobKind.BLOB, index][0] for index in range(count))
        digest.verify_bytes(data, model.digest, where="pulled")
        wait_for(lambda: counts(fleet, "pi", model.digest)[1] == count)
        served, _, again = counts(fleet, "pi", model.digest)
        assert again == 0
        assert served <= count + 64


def test_a_rollout_says_what_each_device_was_sent_for_it(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, bundle: Bundle
) -> None:
    model = bundle.files["model.onnx"].digest
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.fetch(model, [0, 1])
        wait_for(lambda: counts(fleet, "pi", model)[0] == 2)
        fleet.rollout_start("tiny:1.0")
        agent.fetch(model, [2, 3, 4])
        agent.fetch(bundle.digest, [0])

        def pulled() -> dict[str, int]:
            return {one.device: one.bytes_sent for one in fleet.rollout_status().devices}

        wait_for(lambda: pulled() == {"pi": 3 * BLOCK_SIZE + len(bundle.raw), "other": 0})


def test_a_release_published_while_the_controller_runs_is_served(
    fleet: FleetService, controller: ControllerProcess, mosquitto: Mosquitto, tmp_path: Path
) -> None:
    late = Layout(make_bundle(tmp_path, version="2.0", target="rpi4", seed=5))
    blob = late.bundle("rpi4").digest
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.ask(blob, [0])
        wait_for(lambda: agent.answers)
        assert agent.answers[-1][1].status is BlockStatus.NOT_FOUND
        fleet.publish(late.path)
        fleet.rollout_start("tiny:2.0")
        while agent.answers[-1][1].status is not BlockStatus.OK:  # the test's time limit ends this too
            rid = agent.ask(blob, [0])
            wait_for(lambda rid=rid: agent.answers[-1][0] == rid)
        assert agent.blocks[blob, BlobKind.BLOB, 0][-1] == late.bundle("rpi4").raw

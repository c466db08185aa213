"""What operators complain about in other systems (field notes, by number), as far as it concerns the device."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.update_world import World, make_release, sample, serving

from kedge_agent import Model
from kedge_agent.mqtt_link import Link
from kedge_agent.update import events
from kedge_protocol import codec, digest, topics
from kedge_protocol.blocks import BLOCK_SIZE
from kedge_protocol.broker import parse_broker
from kedge_protocol.bundle import config as cfg
from kedge_protocol.messages import BlobKind, Command, ModelState

pytestmark = pytest.mark.device


@pytest.fixture
def world(tmp_path: Path) -> World:
    made = World(tmp_path / "state")
    made.connect()
    return made


def _break_off(world: World, trouble: str) -> None:
    if trouble == "link":
        world.disconnect()
    elif trouble == "controller":
        world.controller_leaves()
    elif trouble == "power":
        world.crash()
    else:
        world.requests.clear()
        world.answers.clear()


def _mend(world: World, trouble: str) -> None:
    if trouble == "controller":
        world.restart_controller(new_boot=True)
    elif trouble != "silence":
        world.connect()


@pytest.mark.parametrize("trouble", ["link", "controller", "silence", "power"])
def test_complaint_3_a_download_that_is_broken_off_anywhere_goes_on_and_never_hangs_without_a_word(
    tmp_path: Path, trouble: str
) -> None:
    release = make_release({"model.bin": sample(1, 6 * BLOCK_SIZE)})
    for steps in range(0, 40, 3):
        world = World(tmp_path / f"{trouble}{steps}", seed=steps)
        world.controller.add(release)
        world.connect()
        world.desire(1, release)
        for _ in range(steps):
            _ = world.disk.run_one() or world.serve_request() or world.deliver()
        _break_off(world, trouble)
        if trouble != "silence":
            # However long it lasts: it says what it waits for.
            for _ in range(200):
                while world.disk.run_one() or world.prover.run_one():
                    pass
                world.tick(60.0)
            if not world.machine.settled:
                model = world.models["digits"]
                assert (model.state, model.detail) == (ModelState.WAITING, "the controller is away")
        _mend(world, trouble)
        # The broker still has the desired state, should the device have lost it.
        world.desire(1, release)
        world.settle()
        serving(world, release)
        assert world.controller.served_again == 0


def test_complaint_5_a_full_disk_fails_the_update_and_neither_the_agent_nor_what_serves(world: World) -> None:
    first = world.controller.add(make_release({"model.bin": sample(1, 2 * BLOCK_SIZE)}))
    second = world.controller.add(make_release({"model.bin": sample(2, 8 * BLOCK_SIZE)}, version="2.0"))
    world.desire(1, first)
    world.settle()
    before = world.reports

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(world.store, "write", full)
        patched.setattr("kedge_agent.persistent_state.files.write", full)
        world.desire(2, second)
        world.settle()
        model = world.models["digits"]
        assert model.failure is not None
        assert "No space left on device" in model.failure.reason
        assert world.reports > before
        assert world.files() == first.files
        assert not list((world.state / "partial").iterdir())
        # It goes on living: it heeds what comes, and time.
        for _ in range(50):
            world.tick(10.0)
    world.desire(3, second)
    world.settle()
    serving(world, second)


@pytest.mark.parametrize("harm", ["gone", "damaged", "cut"])
def test_complaint_11_a_delta_without_its_base_is_made_whole_by_what_is_pulled(world: World, harm: str) -> None:
    old = sample(1, 20 * BLOCK_SIZE)
    new = old[: 15 * BLOCK_SIZE] + sample(2, BLOCK_SIZE) + old[16 * BLOCK_SIZE :]
    files = {"labels.txt": b"a\nb\n"}
    first = world.controller.add(make_release({"model.bin": old, **files}))
    second = world.controller.add(make_release({"model.bin": new, **files}, version="2.0"))
    world.desire(1, first)
    world.settle()
    # All names of the base's bytes, in the store and in the slot.
    for path in [path for path in world.state.rglob("*") if path.is_file() and path.read_bytes() == old]:
        path.chmod(0o644)
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(bytes(len(old)) if harm == "damaged" else old[:5000])
    world.desire(2, second)
    world.settle()
    serving(world, second)
    assert world.files()["labels.txt"] == files["labels.txt"]
    pulled = {key[2] for key in world.controller.served if key[0] == digest.of_bytes(new) and key[1] is BlobKind.BLOB}
    assert pulled == set(range(20))


def test_complaint_12_what_a_broker_acknowledges_and_drops_is_asked_for_again(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": sample(1, 9 * BLOCK_SIZE)}))
    chance = random.Random(3)
    world.desire(1, release)
    for _ in range(20_000):
        if world.machine.settled and not world.disk.waiting:
            break
        if world.requests and chance.random() < 0.4:
            world.requests.pop(0)
        elif world.answers and chance.random() < 0.4:
            world.answers.pop(0)
        elif not (world.disk.run_one() or world.prover.run_one() or world.serve_request() or world.deliver()):
            world.tick(1.0)
    serving(world, release)


class _Channel:
    """The link's end without a broker: what it publishes, and a way in."""

    connected, session = True, 1

    def __init__(self, broker: Any, *_: Any, on_message: Callable[[str, bytes, bool], None], **__: Any) -> None:
        self.broker = broker
        self.arrive = on_message
        self.published: list[str] = []

    def publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> bool:
        self.published.append(topic)
        return True


def test_complaint_13_a_retained_command_is_not_run_and_one_that_comes_twice_is_run_once() -> None:
    done: list[str] = []
    made: list[_Channel] = []

    def connect(*given: Any, **named: Any) -> Any:
        made.append(_Channel(*given, **named))
        return made[-1]

    link = Link(
        parse_broker("mqtt://127.0.0.1:1883"),
        "dev",
        "boot",
        post=lambda _: None,
        command=lambda verb: done.append(verb),
        connect=connect,
    )
    (channel,) = made
    raw = codec.encode(Command(cid="one", verb="report"))
    for retained in (True, True, False, False, True):
        channel.arrive(topics.command("dev", "one"), raw, retained)
    assert done == ["report"]
    # The second one is only acknowledged again.
    assert channel.published == [topics.ack("dev", "one")] * 2
    assert link.connection.connected


@pytest.mark.parametrize(
    ("minimum", "below"), [("999", None), ("0.1", "0.2")], ids=["too old a runtime", "too new a runtime"]
)
def test_complaint_15_a_model_for_another_version_of_the_runtime_is_refused_before_it_is_pulled(
    world: World, minimum: str, below: str | None
) -> None:
    good = world.controller.add(make_release({"model.bin": sample(1, BLOCK_SIZE)}))
    needs = (cfg.RuntimeRequirement(distribution="pytest", minimum=minimum, below=below),)
    other = make_release({"model.bin": sample(2, 9 * BLOCK_SIZE)}, version="2.0", runtimes=needs)
    world.controller.add(other)
    world.desire(1, good)
    world.settle()
    world.desire(2, other)
    world.settle()
    model = world.models["digits"]
    assert model.failure is not None
    assert model.failure.stage == "check"
    assert f"pytest >={minimum}" in model.failure.reason
    assert model.digest == good.digest
    assert not [key for key in world.controller.served if key[0] == digest.of_bytes(sample(2, 9 * BLOCK_SIZE))]


def test_complaint_15_a_hot_reload_drops_no_call_and_mixes_no_answer(tmp_path: Path) -> None:
    state = tmp_path / "state"
    releases = [make_bundle(tmp_path, "tiny", version, head_seed=seed) for version, seed in (("1.0", None), ("2.0", 3))]
    inputs = samples(1)
    expected = [Model(path, target="generic-cpu")(inputs) for path in releases]
    assert not np.allclose(*expected)
    install(state, releases[0])
    enough, answers, troubles = threading.Event(), [0, 0], []

    def call(model: Model) -> None:
        while not enough.is_set():
            try:
                answer = model(inputs)
            except Exception as error:  # noqa: BLE001 -- that none is raised is what is asserted
                troubles.append(error)
                return
            matching = [place for place, one in enumerate(expected) if np.array_equal(answer, one)]
            if len(matching) != 1:
                troubles.append(AssertionError(answer))
                return
            answers[matching[0]] += 1

    with Model("tiny", state=state) as model:
        threads = [threading.Thread(target=call, args=(model,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 13):
            before = answers[number % 2]
            install(state, releases[number % 2])
            while answers[number % 2] == before and not troubles:
                enough.wait(0.002)
        enough.set()
        for thread in threads:
            thread.join()
    assert troubles == []


def test_complaint_8_a_duplicate_desired_state_runs_nothing_twice(world: World) -> None:
    release = world.controller.add(make_release({"model.bin": sample(1, 3 * BLOCK_SIZE)}))
    for _ in range(3):
        world.desire(1, release)
    world.settle()
    for _ in range(3):
        world.desire(1, release)
        world.settle()
    world.post(events.Tick())
    serving(world, release)
    assert world.proofs == 1
    assert max(world.controller.served.values()) == 1

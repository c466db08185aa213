"""A device attests that its bundle serves: by calls of users, or by golden samples through the served endpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.update_world import World, make_release

from kedge_agent.update import actions, events
from kedge_protocol import codec
from kedge_protocol.messages import Desired, ModelState, Served

pytestmark = pytest.mark.device


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def served(world: World) -> Served:
    found = world.models["digits"].served
    assert found is not None
    return found


def knocks(world: World) -> int:
    return sum(isinstance(action, actions.AskEndpoint) for action in world.log)


def rolled_out(world: World, version: str = "1.0", *, number: int = 1, soak: float = 0.0) -> str:
    release = world.controller.add(make_release({"model.bin": version.encode()}, version=version))
    if not world.online:
        world.connect()
    world.desire(number, release, soak=soak)
    world.settle()
    return release.digest


def test_without_a_soak_golden_samples_go_through_the_endpoint_at_once(world: World) -> None:
    rolled_out(world)
    world.tick()
    world.prover.run_one()
    assert (served(world).by, served(world).golden) == ("golden", 8)
    for _ in range(10):
        world.tick(1000.0)
        world.prover.run_one()
    assert world.knocks == 1


def test_a_call_within_the_soak_attests_and_no_golden_sample_is_sent(world: World) -> None:
    rolled_out(world, soak=60.0)
    world.tick(30.0)
    assert served(world).by is None
    reports = world.reports
    world.call()
    world.tick(1.0)
    assert (served(world).by, served(world).calls) == ("calls", 1)
    assert world.reports == reports + 1
    world.call(times=5)
    for _ in range(10):
        world.tick(30.0)
    # Later calls are the telemetry's matter: no report for each.
    assert world.reports == reports + 1
    assert world.knocks == 0


def test_where_no_call_comes_within_the_soak_golden_samples_do(world: World) -> None:
    rolled_out(world, soak=60.0)
    for _ in range(11):
        world.tick(5.0)
        world.prover.run_one()
    assert served(world) == Served()
    for _ in range(3):
        world.tick(5.0)
        world.prover.run_one()
    assert served(world) == Served(golden=8)
    world.call()
    world.post(events.Counted("digits", world.models["digits"].digest or "", 1))
    assert served(world).by == "calls"


def test_calls_that_came_before_the_switch_attest_nothing(world: World) -> None:
    old = rolled_out(world, "1.0")
    world.call(times=7)
    rolled_out(world, "2.0", number=2)
    assert rolled_out(world, "1.0", number=3, soak=60.0) == old
    world.tick()
    assert served(world) == Served()
    world.call()
    world.tick()
    assert served(world).calls == 1


def test_the_attestation_begins_anew_with_another_bundle_and_outlives_a_restart(world: World) -> None:
    rolled_out(world, "1.0")
    world.tick()
    world.prover.run_one()
    assert served(world).golden == 8
    world.crash()
    world.tick()
    assert served(world).golden == 8
    rolled_out(world, "2.0", number=2, soak=60.0)
    assert served(world) == Served()


def test_an_answer_that_comes_late_attests_nothing_of_another_bundle(world: World) -> None:
    first = rolled_out(world, "1.0", soak=10.0)
    world.tick(11.0)
    (asked,) = [action for action in world.log if isinstance(action, actions.AskEndpoint)]
    world.prover.waiting.clear()
    rolled_out(world, "2.0", number=2, soak=600.0)
    rolled_out(world, "1.0", number=3, soak=600.0)
    world.tick()
    world.post(events.EndpointAnswered(model="digits", digest=first, attempt=asked.attempt, samples=8))
    assert served(world) == Served()


def test_an_endpoint_that_does_not_answer_is_tried_again_more_and_more_seldom_and_said_once(world: World) -> None:
    world.endpoint_silent = True
    rolled_out(world)
    assert served(world) == Served(problem="nobody answers")
    reports = world.reports
    for _ in range(3600):
        world.tick(1.0)
        world.prover.run_one()
    assert 5 < world.knocks < 13
    assert world.reports == reports
    assert world.models["digits"].state is ModelState.SERVING
    world.endpoint_silent = False
    world.tick(3600.0)
    world.prover.run_one()
    assert served(world) == Served(golden=8)


def test_a_knock_that_is_never_answered_is_made_again(world: World) -> None:
    rolled_out(world, soak=10.0)
    world.tick(11.0)
    assert knocks(world) == 1
    world.prover.waiting.clear()
    for seconds in (world.settings.prove_deadline, 1.0, world.settings.endpoint_retry):
        world.tick(seconds + 1)
    assert knocks(world) == 2
    world.prover.run_one()
    assert served(world).by == "golden"


def test_wrong_answers_through_the_endpoint_bring_the_old_bundle_back(world: World) -> None:
    old = rolled_out(world, "1.0")
    world.endpoint_wrong.add("2.0")
    rolled_out(world, "2.0", number=2)
    world.tick()
    world.prover.run_one()
    world.settle()
    model = world.models["digits"]
    assert (model.state, model.digest, model.served) == (ModelState.FAILED, old, None)
    assert model.failure is not None
    assert model.failure.stage == "prove"
    assert "through the served endpoint" in model.failure.reason
    world.crash()
    world.tick()
    assert world.models["digits"].state is ModelState.FAILED


def test_a_soak_beyond_all_bounds_is_refused(world: World) -> None:
    for soak in (-1.0, 1e9):
        desired = Desired(version=1, models={}, sizes={}, soaks={"digits": soak})
        world.post(events.DesiredArrived(codec.encode(desired)))
        assert world.machine.desired_version == 0
        assert "soak" in (world.machine.desired_states.problem or "")

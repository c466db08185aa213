"""The machine of staged rollouts, over drawn devices, gates, orders and times: it needs neither clock nor database."""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.fleet.staged import machine, orders
from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.phases import ENDED, REACHED, Phase, Step
from kedge.fleet.staged.policy import Approval, OnAbort, Policy, Undecided
from kedge.fleet.staged.states import Action, Answer, Facts, Member, Revert, Send, Shadow, Sight, State, Unshadow
from kedge_protocol.errors import FleetError

TICK = 10.0


def result(verdict: Verdict) -> GateResult:
    return GateResult(gate="agreement", target="t", verdict=verdict, figure=0.0, limit=1.0, samples=1, detail="drawn")


@dataclass
class Drawn:
    """A device of the test: what it answers to each time that it is told, and to going back."""

    answers: list[Sight]
    back: bool
    told: int = 0
    reverted: int = 0
    tells: list[float] = field(default_factory=list)


SIGHTS = st.sampled_from(
    [
        Sight(answer=Answer.SERVES),
        Sight(answer=Answer.SERVES),
        Sight(answer=Answer.FAILED, stage="fetch"),
        Sight(answer=Answer.FAILED, stage="prove"),
        Sight(answer=Answer.FAILED),
        Sight(answer=Answer.UNDER_WAY),
    ]
)
DEVICES = st.lists(
    st.builds(Drawn, answers=st.lists(SIGHTS, min_size=1, max_size=3), back=st.booleans()), min_size=1, max_size=14
)
POLICIES = st.builds(
    Policy,
    shadow=st.sampled_from([0.0, 0.1]),
    soak=st.sampled_from([0.0, 50.0]),
    max_soak=st.just(200.0),
    undecided=st.sampled_from(Undecided),
    approval=st.sampled_from(Approval),
    on_abort=st.sampled_from(OnAbort),
    parallel=st.integers(0, 3),
    per_minute=st.integers(0, 6),
    progress_timeout=st.just(100.0),
    deadline=st.just(500.0),
    retries=st.integers(0, 2),
    retry_after=st.just(30.0),
)
ORDERS = st.lists(
    st.tuples(st.integers(0, 60), st.sampled_from(["pause", "resume", "abort", "promote", "retry"])), max_size=5
)


class Run:
    """Lets a machine run against drawn devices, and notes each action."""

    def __init__(self, policy: Policy, devices: list[Drawn], waves: int, verdicts: list[Verdict]) -> None:
        self.policy = policy
        self.devices = devices
        self.verdicts = verdicts
        members = {
            number: Member(target="t", wave=1 + number * waves // len(devices)) for number in range(len(devices))
        }
        self.state = State(waves=waves, phase=Phase.QUEUED, members=members)
        self.now = 1000.0
        self.tells: list[tuple[int, ...]] = []
        self.reached: set[int] = set()
        self.shadowed: set[int] = set()

    def apply(self, after: State, actions: tuple[Action, ...]) -> None:
        for action in actions:
            if isinstance(action, Send):
                self.tells.append(action.devices)
                for number in action.devices:
                    assert number not in self.shadowed
                    assert self.state.members[number].step in (Step.WAITING, Step.FAILED, Step.SILENT)
                    assert after.members[number].step is Step.UPDATING
                    self.devices[number].told += 1
                    self.reached.add(number)
            elif isinstance(action, Shadow):
                assert not self.shadowed & set(action.devices)
                self.shadowed |= set(action.devices)
            elif isinstance(action, Unshadow):
                assert self.shadowed >= set(action.devices)
                self.shadowed -= set(action.devices)
            elif isinstance(action, Revert):
                for number in action.devices:
                    self.devices[number].reverted += 1
        self.state = after

    def facts(self, round_number: int) -> Facts:
        seen = {}
        for number, member in self.state.members.items():
            device = self.devices[number]
            if member.step in REACHED:
                seen[number] = device.answers[min(device.told, len(device.answers)) - 1]
            elif member.step is Step.REVERTING and device.back:
                seen[number] = Sight(answer=Answer.SERVES)
        verdict = self.verdicts[round_number % len(self.verdicts)]
        return Facts(seen=seen, gates=(result(verdict),))

    def round(self, number: int) -> None:
        facts = self.facts(number)
        before = self.state
        after, actions = machine.advance(self.policy, before, facts, self.now)
        assert (after, actions) == machine.advance(self.policy, before, facts, self.now)
        self.apply(after, actions)
        if after is before and not actions:
            # Nothing is new: it stays so until a time has come.
            assert machine.advance(self.policy, after, facts, self.now) == (after, ())
        self.now += TICK

    def order(self, name: str) -> None:
        with contextlib.suppress(FleetError):
            if name == "abort":
                self.apply(*orders.abort(self.policy, self.state, self.now, reason="drawn"))
            else:
                self.apply(*getattr(orders, name)(self.policy, self.state, self.now))


@settings(max_examples=150)
@given(POLICIES, DEVICES, st.integers(1, 4), st.lists(st.sampled_from(Verdict), min_size=1, max_size=6), ORDERS)
def test_a_rollout_ends_tells_each_device_once_a_try_and_takes_back_all_that_it_reached(
    policy: Policy, devices: list[Drawn], waves: int, verdicts: list[Verdict], given_orders: list[tuple[int, str]]
) -> None:
    run = Run(policy, devices, waves, verdicts)
    by_round = dict(given_orders)
    for number in range(400):
        run.round(number)
        if number in by_round:
            run.order(by_round[number])
        if number > 80 and run.state.phase not in ENDED:
            # A person who is asked answers, as the policy wants.
            if run.state.paused:
                run.order("resume")
            if run.state.phase is Phase.HOLDING:
                run.order("promote")
    assert run.state.phase in ENDED
    assert not run.shadowed
    retried = sum(name == "retry" for _, name in given_orders)
    for device in devices:
        assert device.told <= (1 + policy.retries) * (1 + retried)
        assert device.reverted <= 1
    if run.state.phase is Phase.ABORTED and policy.on_abort is OnAbort.REVERT:
        assert {number for number, device in enumerate(devices) if device.reverted} == run.reached
    if policy.on_abort is OnAbort.KEEP:
        assert not any(device.reverted for device in devices)
    if run.state.phase is Phase.DONE:
        assert Counter(member.step for member in run.state.members.values()) == {Step.SERVING: len(devices)}
    if policy.parallel:
        assert max(map(len, run.tells), default=0) <= policy.parallel


@given(DEVICES, st.integers(2, 4))
def test_no_device_of_a_wave_is_told_before_the_wave_before_is_settled(devices: list[Drawn], waves: int) -> None:
    policy = Policy(soak=50.0, progress_timeout=100.0, deadline=500.0, retries=0)
    run = Run(policy, devices, waves, [Verdict.PASS])
    soaking_since = 0.0
    for number in range(400):
        before, now = run.state, run.now
        run.round(number)
        if before.wave and run.state.wave > before.wave:
            assert now - soaking_since >= policy.soak
        if any(
            one.step in (Step.WAITING, Step.UPDATING) and one.wave <= run.state.wave
            for one in run.state.members.values()
        ):
            soaking_since = run.now
        for told in run.tells[-1:]:
            for device in told:
                if before.members[device].step is not Step.WAITING:
                    continue
                wave = run.state.members[device].wave
                earlier = [member for member in run.state.members.values() if member.wave < wave]
                assert not [one for one in earlier if one.step in (Step.WAITING, Step.UPDATING)]
    assert run.state.phase in (Phase.DONE, Phase.INCOMPLETE)


def test_silence_while_nobody_listened_is_not_the_devices() -> None:
    policy = Policy(progress_timeout=100.0, deadline=10_000.0)
    member = Member(target="t", wave=1, step=Step.UPDATING, told_at=0.0, moved_at=0.0, tries=1)
    state = State(waves=1, wave=1, phase=Phase.RUNNING, members={1: member})
    seen = {1: Sight(answer=Answer.UNDER_WAY)}
    after, _ = machine.advance(policy, state, Facts(seen=seen, listening_since=950.0), 1000.0)
    assert after.members[1].step is Step.UPDATING
    after, _ = machine.advance(policy, state, Facts(seen=seen, listening_since=0.0), 1000.0)
    assert after.members[1].step is Step.SILENT


def test_progress_keeps_a_slow_device_from_being_silent_until_its_deadline() -> None:
    policy = Policy(progress_timeout=100.0, deadline=1000.0)
    member = Member(target="t", wave=1, step=Step.UPDATING, tries=1)
    state = State(waves=1, wave=1, phase=Phase.RUNNING, members={1: member})
    now = 0.0
    while now < 990:
        now += 30
        seen = {1: Sight(answer=Answer.UNDER_WAY, mark=f"fetching {now}")}
        state, _ = machine.advance(policy, state, Facts(seen=seen), now)
        assert state.members[1].step is (Step.UPDATING if now <= 1000 else Step.SILENT)
    state, _ = machine.advance(policy, state, Facts(seen={1: Sight(answer=Answer.UNDER_WAY, mark="more")}), 1001.0)
    assert state.members[1].step is Step.SILENT


@pytest.mark.parametrize("by_a_person", [True, False])
def test_an_abort_takes_back_a_device_that_waits_for_another_try(by_a_person: bool) -> None:
    policy = Policy(retries=1, retry_after=30.0)
    member = Member(target="t", wave=1, step=Step.FAILED, told_at=1000.0, moved_at=1010.0, tries=1, stage="fetch")
    members = {1: member, 2: Member(target="t", wave=2)}
    state = State(waves=2, wave=1, phase=Phase.RUNNING, members=members, paused=not by_a_person)
    if by_a_person:
        state, _ = orders.retry(policy, state, 1100.0)
    else:
        seen = {1: Sight(answer=Answer.FAILED, stage="fetch")}
        state, _ = machine.advance(policy, state, Facts(seen=seen), 1100.0)
    assert state.members[1].step is Step.WAITING
    after, actions = orders.abort(policy, state, 1110.0, reason="not today")
    assert [action.devices for action in actions if isinstance(action, Revert)] == [(1,)]
    assert after.phase is Phase.REVERTING
    assert after.members[1].step is Step.REVERTING

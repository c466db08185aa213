"""Two real agents of one target at an embedded broker, and a release with two bundles for it: the first device measures
both and keeps one, the second is given that at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.agents import AgentProcess
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.ports import free_port

from kedge.fleet.keys import Keys
from kedge.fleet.service import FleetService
from kedge_protocol import codec
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.candidates import Candidate, choose
from kedge_protocol.messages import ReportedCandidate

FIRST, SECOND = "onnxruntime", "openvino"
NAME = "generic-cpu"


class Site:
    """A fleet with a controller, and two agents that trust its keys alone."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.fleet = stack.enter_context(FleetService(folder / "state"))
        port = free_port()
        keys = folder / "trust.json"
        keys.write_bytes(codec.encode(Keys(self.fleet.state).trust()))
        keys.chmod(0o600)
        self.controller = ControllerProcess(self.fleet.state, "--embedded", "--listen", f"127.0.0.1:{port}")
        stack.enter_context(self.controller)
        self.agents = {}
        for name in ("one", "two"):
            self.fleet.device_add(name, NAME, {"at": name})
            agent = AgentProcess(
                folder, f"mqtt://127.0.0.1:{port}", name=name, serve=False, more='[trust]\nfile = "trust.json"\n'
            )
            self.agents[name] = stack.enter_context(agent)
        self.controller.start()
        for agent in self.agents.values():
            agent.start()

    def roll_out(self, at: str) -> None:
        """Give a device the release, and wait until it serves."""
        self.fleet.rollout_start("tiny:1.0", {"at": at})
        status = self.fleet.rollout_status(wait=300)
        assert status.done, status

    def told(self, device: str) -> tuple[ReportedCandidate, ...]:
        """What a device last said of its candidates."""
        reported = self.fleet.device(device).device.reported
        assert reported is not None
        return reported.models["tiny"].candidates


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(tmp_path, stack)


def test_the_first_device_measures_two_and_the_second_is_given_the_better_one(site: Site, tmp_path: Path) -> None:
    layout = Layout(make_bundle(tmp_path / "out", mebibytes=0.3, also={SECOND: None}))
    site.fleet.publish(layout.path)
    both = {one.digest: one for one in layout.candidates(NAME)}
    site.roll_out("one")
    measured = {one.bundle: one for one in site.fleet.latencies(NAME).measurements if one.device == "one"}
    assert measured.keys() == both.keys()
    spans = [(measured[digest].p50_ms, measured[digest].p95_ms) for digest in both]
    sizes = [bundle.transfer_bytes for bundle in both.values()]
    kept = choose([Candidate(size=s, p50_ms=p50, p95_ms=p95) for s, (p50, p95) in zip(sizes, spans, strict=True)])
    assert kept is not None
    chosen, loser = list(both)[kept], list(both)[1 - kept]
    agent = site.agents["one"]
    slot = agent.current()
    assert slot is not None
    assert slot.digest == chosen
    # Nothing of the loser stays.
    assert [path.name for path in slot.folder.parent.iterdir()] == [slot.folder.name]
    assert not (agent.state / "blobs" / "sha256" / loser[7:]).exists()
    (status,) = site.fleet.rollout_status().devices
    assert (status.digest, status.backend) == (chosen, both[chosen].config.backend)
    assert "ms here" in status.choice

    site.roll_out("two")
    other = site.agents["two"].current()
    assert other is not None
    assert other.digest == chosen
    rollout = site.fleet.rollout_status()
    assert rollout.devices[0].backend == both[chosen].config.backend
    assert "on 1 device" in rollout.devices[0].choice
    assert {one.backend: one.devices for one in rollout.choices[0].backends} == {
        bundle.config.backend: int(digest == chosen) for digest, bundle in both.items()
    }
    sent = {transfer.digest for transfer in site.fleet.transfers("two")}
    assert chosen in sent
    assert loser not in sent


def test_a_candidate_whose_golden_vectors_fail_leads_to_the_other_on_both_devices(site: Site, tmp_path: Path) -> None:
    layout = Layout(make_bundle(tmp_path / "out", broken="golden", also={SECOND: None}))
    site.fleet.publish(layout.path)
    first, second = layout.candidates(NAME)
    site.roll_out("one")
    site.roll_out("two")
    for agent in site.agents.values():
        slot = agent.current()
        assert slot is not None
        assert slot.digest == second.digest
    choice = site.fleet.rollout_status().choices[0]
    assert [(one.backend, one.devices, one.refused) for one in choice.backends] == [(FIRST, 0, 1), (SECOND, 1, 0)]
    assert first.digest not in {transfer.digest for transfer in site.fleet.transfers("two")}

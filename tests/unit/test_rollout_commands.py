"""``kedge rollout`` with a policy, in a shell."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.support.bundles import make_bundle

from kedge.cli.main import main
from kedge.cli.rollout_orders import gate_lines
from kedge.fleet.staged import policy as policies
from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.policy import Approval, OnAbort

FILE = """
waves = [2, "100%"]
min_per_target = 1
soak = "15m"
not_before = 2096-12-01T22:00:00+01:00
[gates]
error_rate = 0.05
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("layouts"), target=["rpi4", "generic-cpu"])


def run(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    output = capsys.readouterr()
    assert int(ended.value.code or 0) == status, output.err
    return output.out + output.err


@pytest.fixture
def state(tmp_path: Path, release: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    monkeypatch.setenv("KEDGE_FLEET_STATE", str(tmp_path / "state"))
    run(capsys, "publish", str(release))
    for number in range(4):
        run(capsys, "device", "add", f"pi-{number}", "--target", "rpi4", "--label", f"half={number % 2}")
    return tmp_path


def test_a_rollout_is_planned_started_paused_and_aborted_by_commands(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = state / "policy.toml"
    file.write_text(FILE, encoding="utf-8")
    plan = run(capsys, "rollout", "start", "tiny:1.0", "--policy", str(file), "--dry-run")
    assert "would go to 4 devices in 2 waves" in plan
    one = run(capsys, "rollout", "start", "tiny:1.0", "--waves", "1,100%", "--min-per-target", "1", "--dry-run")
    assert "wave 1 has too few devices of rpi4 for" in one
    assert "p99_ratio" in one
    assert "wave 2 has too few" not in one
    small = run(capsys, "rollout", "start", "tiny:1.0", "--waves", "1,100%", "--dry-run")
    assert "would go to 4 devices in 1 wave;" in small
    assert "wave 1 has 4 of target rpi4, not 5: there are no more" in small
    assert "there is no rollout" in run(capsys, "rollout", "status", status=1)
    options = ("--policy", str(file), "--soak", "1h30m", "--gate", "drift=off", "--approval", "each")
    started = run(capsys, "rollout", "start", "tiny:1.0", *options)
    assert "rollout 1: tiny:1.0 to 4 devices in 2 waves" in started
    shown = json.loads(run(capsys, "rollout", "status", "--json"))
    policy = shown["stage"]["policy"]
    assert (policy["soak"], policy["approval"], policy["gates"]["error_rate"]) == (5400.0, "each", 0.05)
    assert policy["not_before"] == 4005234000.0
    assert policy["gates"]["off"] == ["drift"]
    assert "scheduled, paused" in run(capsys, "rollout", "pause")
    assert "scheduled (it begins at 2096-12-01T21:00Z)" in run(capsys, "rollout", "resume")
    assert "no wave is under way" in run(capsys, "rollout", "promote", status=1)
    assert "none of its devices" in run(capsys, "rollout", "retry", status=1)
    assert "aborted" in run(capsys, "rollout", "abort", "--reason", "not today")
    watched = run(capsys, "rollout", "watch", status=1)
    assert "not today" in watched
    assert "aborted" in run(capsys, "rollout", "list")
    assert "not today" in run(capsys, "rollout", "status")


def test_a_terminal_shows_a_rollout_live_and_a_persons_orders_as_they_come(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--waves", "1,100%", "--min-per-target", "1", "--not-before", "2036-12-01T22:00+01:00")
    run(capsys, "rollout", "start", "tiny:1.0", *options)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    watch = [sys.executable, "-m", "kedge.cli.main", "rollout", "watch", "--interval", "0.1"]
    environment = {**os.environ, "TERM": "xterm-256color"}
    process = subprocess.Popen(watch, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""

    def until(words: bytes) -> None:
        nonlocal seen
        while words not in seen:
            assert select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096)

    try:
        until(b"rollout 1: tiny:1.0")
        until(b"scheduled for")
        until(b"wave 1: 1 device: 1 waiting")
        run(capsys, "rollout", "pause")
        until(b"scheduled, paused")
        # A second look stands in the place of the first: the cursor goes up.
        assert b"\x1b[1A" in seen
        run(capsys, "rollout", "abort", "--reason", "not today")
        until(b"not today")
        assert process.wait(60) == 1
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_gates_that_fail_come_first_with_their_evidence_and_the_others_are_counted() -> None:
    def result(gate: str, target: str, verdict: Verdict, detail: str = "no calls of users came") -> GateResult:
        return GateResult(
            gate=gate, target=target, verdict=verdict, figure=None, limit=0.02, samples=0, detail=detail
        )  # fmt: skip

    found = [result("golden", f"t{number}", Verdict.PASS) for number in range(7)]
    found += [result("error_rate", name, Verdict.UNDECIDED) for name in ("t0", "t1")]
    found += [result("p95_ratio", name, Verdict.UNDECIDED, f"of {name}") for name in ("t0", "t1")]
    found.append(result("error_rate", "t3", Verdict.FAIL, "6.53% of 628 calls failed"))
    assert gate_lines(found) == [
        "  fail      error_rate of t3: 6.53% of 628 calls failed",
        "  undecided error_rate of t0, t1: no calls of users came",
        "  undecided p95_ratio of t0, t1",
        "  pass      golden of 7 targets",
    ]
    assert len(gate_lines(found, each=True)) == len(found)


def test_a_selector_reaches_only_the_devices_that_meet_it(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = run(capsys, "rollout", "start", "tiny:1.0", "--select", "half=1,name not in (pi-3)")
    assert "to 1 device in 1 wave" in started
    assert "cannot be read" in run(capsys, "rollout", "start", "tiny:1.0", "--select", "half=<1", status=1)


def test_a_policy_with_a_mistake_is_refused_with_what_was_meant(
    state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = state / "policy.toml"
    for text, words in (
        ("waves = ['1%']", "must reach 100%"),
        ("soack = '1h'", "did you mean 'soak'"),
        ("soak = 'long'", "no time span"),
        ("on_abort = 'panic'", "none of revert, keep"),
        ("[gates]\nerror_rate = 2.0", "error_rate"),
        ("not_before = 2026-12-01T22:00:00", "has no UTC offset"),
        ("waves = [", "is no TOML"),
    ):
        file.write_text(text, encoding="utf-8")
        assert words in run(capsys, "rollout", "start", "tiny:1.0", "--policy", str(file), status=1)
    assert run(capsys, "rollout", "list").count("\n") == 1


def test_the_policy_in_the_docs_is_a_policy() -> None:
    text = (ROOT / "docs" / "fleet.md").read_text(encoding="utf-8")
    found = re.search(r"```toml\n(# canary\.toml\n.*?)```", text, re.DOTALL)
    assert found is not None
    read = policies.parse(policies.toml.loads(found[1]))
    assert (read.soak, read.approval, read.on_abort) == (1800.0, Approval.FIRST, OnAbort.REVERT)
    assert read.window is not None
    assert policies.load(policies.dump(read)) == read

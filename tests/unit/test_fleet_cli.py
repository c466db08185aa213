"""``kedge device``, ``publish``, ``rollout`` in a shell: what they print and how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.bundles import make_bundle

from kedge.cli.main import main
from kedge.fleet.service import FleetService


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def kedge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The entry point of ``kedge``, in this process: a new one for each command would take most of the time."""
    monkeypatch.setenv("KEDGE_FLEET_STATE", str(tmp_path / "state"))

    def run(*arguments: str, ok: bool = True) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        output = capsys.readouterr()
        done = Done(int(ended.value.code or 0), output.out, output.err)
        assert done.returncode == 0 or not ok, done.stderr
        return done

    return run


def as_json(done: Done) -> Any:
    return json.loads(done.stdout)


def test_of_many_devices_some_are_named_and_the_others_counted(kedge: Run, tmp_path: Path) -> None:
    with FleetService(tmp_path / "state") as fleet:
        for version, seed in (("1.0", None), ("2.0", 1)):
            fleet.publish(make_bundle(tmp_path, version=version, target="rpi4", head_seed=seed))
        for number in range(25):
            fleet.device_add(f"pi-{number:02}", "rpi4")
        fleet.rollout_start("tiny:1.0")
    state = ("--state", str(tmp_path / "state"))
    asked = kedge("samples", "request", "--model", "tiny", "--where", "low-confidence", "--count", "1", *state)
    assert "1 device asked for 1 samples of tiny" in asked.stdout
    assert asked.stderr.count("others were drawn") == 20
    assert "left out 4 more" in asked.stderr
    begun = kedge("shadow", "start", "tiny:2.0", *state).stdout
    assert "on 25 devices: pi-00 pi-01" in begun
    assert "pi-19 and 5 more" in begun
    assert "pi-20" not in begun


def test_the_way_from_a_device_to_a_rollout_and_back(kedge: Run, tmp_path: Path) -> None:
    out = make_bundle(tmp_path, target="rpi4")
    kedge("device", "add", "pi", "--target", "rpi4", "--label", "site=berlin", "--label", "floor=1")
    kedge("device", "add", "cam", "--target", "generic-cpu", "--label", "site=berlin")
    listed = kedge("device", "list", "--select", "site=berlin", "--select", "floor=1").stdout
    assert "floor=1 site=berlin" in listed
    assert "cam" not in listed
    assert "never seen" in listed
    published = kedge("publish", str(out)).stdout
    assert "published tiny:1.0 for rpi4" in published
    assert "it was there already" in kedge("publish", str(out)).stdout
    started = kedge("rollout", "start", "tiny:1.0")
    assert "to 1 device" in started.stdout
    assert "left out cam" in started.stderr
    status = as_json(kedge("rollout", "status", "--json"))
    digest = status["devices"][0]["digest"]
    assert status["done"] is False
    assert status["devices"][0]["progress"] == "offline"
    shown = kedge("rollout", "status").stdout
    assert digest[7:19] in shown
    assert kedge("rollout", "status", "--wait", "0.1", ok=False).returncode == 1
    assert digest in kedge("device", "show", "pi").stdout
    assert as_json(kedge("device", "show", "pi", "--json"))["device"]["desired"] == {"tiny": digest}
    assert as_json(kedge("rollout", "revert", "--json"))["kind"] == "revert"
    listed = kedge("device", "list", "--json")
    assert as_json(listed)[1]["desired"] == {}
    assert [json.loads(line.rstrip(","))["name"] for line in listed.stdout.splitlines()[1:-1]] == ["cam", "pi"]
    kedge("device", "remove", "pi")
    assert [one["name"] for one in as_json(kedge("device", "list", "--json"))] == ["cam"]


def test_counts_come_first_and_lists_are_filtered_paged_and_told_of(kedge: Run, tmp_path: Path) -> None:
    out = make_bundle(tmp_path, target="rpi4")
    kedge("publish", str(out))
    for number in range(6):
        kedge("device", "add", f"d{number}", "--target", "rpi4", "--label", f"half={number % 2}")
    kedge("rollout", "start", "tiny:1.0")
    kedge("rollout", "start", "tiny:1.0", "--select", "half=1")
    shown = kedge("rollout", "status", "1", "--limit", "2")
    head, counts, *rows = shown.stdout.splitlines()
    assert head == "rollout 1: tiny:1.0 (start, active)"
    assert counts == "6 devices: 3 offline, 3 superseded"
    assert [row.split()[0] for row in rows] == ["device", "d0", "d1"]
    assert "1 to 2 of 6" in shown.stderr
    only = kedge("rollout", "status", "1", "--only", "superseded").stdout
    assert "rollout 2 took it over" in only
    assert "d0" not in only
    assert "none of its devices meets --only and --select" in kedge("rollout", "status", "1", "--only", "done").stderr
    assert [
        one["device"] for one in as_json(kedge("rollout", "status", "1", "--select", "half=0", "--json"))["devices"]
    ]
    kedge("rollout", "start", "tiny:1.0", "--select", "half=0")
    # Whatever its devices serve: it is not done any more.
    assert "(start, superseded)" in kedge("rollout", "status", "1").stdout
    listed = kedge("rollout", "list").stdout.splitlines()
    assert [row.split()[0] for row in listed] == ["rollout", "3", "2", "1"]
    assert "3 devices: 3 offline" in listed[1]
    devices = kedge("device", "list", "--limit", "2", "--offset", "2")
    assert [row.split()[0] for row in devices.stdout.splitlines()] == ["device", "d2", "d3"]
    assert "6 devices, 0 online" in devices.stderr


def test_labels_releases_and_backups_by_command(kedge: Run, tmp_path: Path) -> None:
    kedge("publish", str(make_bundle(tmp_path, target="rpi4")))
    kedge("device", "add", "pi", "--target", "rpi4", "--label", "site=x")
    assert "site=y" in kedge("device", "edit", "pi", "--label", "site=y").stdout
    assert kedge("device", "edit", "pi", ok=False).returncode == 2
    assert "tiny:1.0" in kedge("release", "list").stdout
    saved = tmp_path / "saved.db"
    assert "1 device" in kedge("controller", "backup", str(saved)).stdout
    assert "removed tiny:1.0" in kedge("release", "remove", "tiny:1.0").stdout
    assert as_json(kedge("release", "list", "--json")) == []
    assert "--force" in kedge("controller", "restore", str(saved), ok=False).stderr
    again = kedge("controller", "restore", str(saved), "--force")
    assert "blobs of tiny:1.0 are missing: publish it again" in again.stderr
    assert as_json(kedge("release", "list", "--json"))[0]["name"] == "tiny"
    report = kedge("device", "report", "pi", "--wait", "0", ok=False)
    assert (report.returncode, "no controller sent it" in report.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (("device", "add", "pi", "--target", "toaster"), 1, "unknown target 'toaster'"),
        (("device", "add", "p/i", "--target", "rpi4"), 1, "not a usable device name"),
        (("device", "add", "pi", "--target", "rpi4", "--label", "site"), 2, "not KEY=VALUE"),
        (("device", "show", "pi"), 1, "no device 'pi'"),
        (("rollout", "start", "tiny:1.0"), 1, "no release tiny:1.0"),
        (("rollout", "status"), 1, "no rollout"),
        (("rollout", "status", "--wait", "-1"), 2, "--wait"),
        (("rollout", "status", "99999999999999999999"), 1, "no rollout 99999999999999999999"),
        (("rollout", "revert", "99999999999999999999"), 1, "no rollout 99999999999999999999"),
        (("rollout", "status", "--limit", "99999999999999999999"), 2, "--limit"),
        (("rollout", "list", "--limit", "99999999999999999999"), 2, "--limit"),
        (("rollout", "status", "--only", "asleep"), 2, "--only"),
        (("release", "remove", "tiny:1.0"), 1, "no release tiny:1.0"),
        (("release", "remove", "tiny"), 1, "NAME:VERSION"),
        (("device", "edit", "pi", "--label", "a=b"), 1, "no device 'pi'"),
        (("device", "report", "pi"), 1, "no device 'pi'"),
        (("controller", "restore", "none.db"), 1, "no such file"),
        (("publish", "."), 1, "not an OCI image layout"),
        (("controller", "run"), 1, "either --broker or --embedded"),
        (("controller", "run", "--broker", "broker"), 1, "not a broker's address"),
        (("controller", "run", "--embedded", "--listen", "x"), 1, "not an address to listen at"),
    ],
)
def test_mistakes_are_one_clear_error(kedge: Run, arguments: tuple[str, ...], status: int, text: str) -> None:
    done = kedge(*arguments, ok=False)
    assert done.returncode == status
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_a_controller_loads_no_compiler_and_no_runtime(tmp_path: Path) -> None:
    program = (
        "import sys, threading, os, signal\n"
        "from pathlib import Path\n"
        "import kedge.cli.controller\n"
        "from kedge.fleet.controller import run\n"
        "from kedge.fleet.options import ControllerOptions\n"
        "from tests.support.ports import free_port\n"
        "threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "run(Path(sys.argv[1]), ControllerOptions(embedded=True, listen=f'127.0.0.1:{free_port()}'))\n"
        "heavy = {name.partition('.')[0] for name in sys.modules}\n"
        "unwanted = ('onnx', 'onnxruntime', 'openvino', 'torch', 'nncf', 'ai_edge_litert', 'matplotlib')\n"
        "print(sorted(heavy.intersection(unwanted)), 'amqtt' in heavy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "state")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] True"

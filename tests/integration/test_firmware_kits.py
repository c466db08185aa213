"""Kits: unpacked, installed into a clean root by their own script, judged by systemd, read by the agent."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.boards import PASSWORD, empty_system, install, make_kit, unpack

from kedge_agent import config
from kedge_targets import target as targets

TARGETS = targets.names()
SERVICE = "kedge-agent.service"

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="installing gives files to other users: root only")


@dataclass(frozen=True)
class Board:
    """A kit that was installed."""

    target: str
    unpacked: Path
    root: Path


@pytest.fixture(scope="module", params=TARGETS)
def board(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Board:
    if os.geteuid() != 0:
        pytest.skip("installing gives files to other users: root only")
    folder = tmp_path_factory.mktemp(request.param)
    unpacked = unpack(make_kit(folder, request.param), folder / "kit")
    root = empty_system(folder / "root")
    done = install(unpacked, root)
    assert done.returncode == 0, done.stderr
    assert "starts with the next boot" in done.stdout
    return Board(request.param, unpacked, root)


@pytest.mark.needs("systemd-analyze")
def test_systemd_accepts_the_units(board: Board) -> None:
    units = sorted(path.name for path in (board.root / "etc/systemd/system").glob("*.service"))
    assert SERVICE in units
    command = ["systemd-analyze", "verify", f"--root={board.root}", "--man=no", *units]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kedge" not in done.stderr, done.stderr


@pytest.mark.needs("systemd-analyze")
def test_the_service_is_hardened_with_its_drop_ins(board: Board) -> None:
    """systemd's own judgement: 0 is shut, 10 is open; a service as it comes has 9.6."""
    command = ["systemd-analyze", "security", "--offline=true", f"--root={board.root}", "--threshold=30", SERVICE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.needs("systemd-sysusers")
def test_user_rights_and_services_are_in_place(board: Board) -> None:
    passwd = (board.root / "etc/passwd").read_text()
    (uid,) = re.findall(r"^kedge:x:(\d+):\d+:[^:]*:/var/lib/kedge:\S*nologin$", passwd, re.MULTILINE)
    secret = (board.root / "etc/kedge/password").stat()
    assert (secret.st_uid, secret.st_mode & 0o777) == (int(uid), 0o600)
    wanted = board.root / "etc/systemd/system/multi-user.target.wants"
    units = {path.name for path in (board.root / "etc/systemd/system").glob("*.service")}
    assert {path.name for path in wanted.iterdir()} == units


def test_everything_of_the_kit_is_installed_with_its_mode(board: Board) -> None:
    shipped = [path for top in ("etc", "usr") for path in (board.unpacked / top).rglob("*") if path.is_file()]
    assert shipped
    for path in shipped:
        there = board.root / path.relative_to(board.unpacked)
        assert there.read_bytes() == path.read_bytes()
        assert there.stat().st_mode & 0o777 == path.stat().st_mode & 0o777


def test_the_agent_reads_what_was_installed(board: Board) -> None:
    found = config.read(board.root / "etc/kedge/agent.toml")
    assert (found.name, found.target) == ("d1", board.target)
    assert found.broker.url == "mqtts://broker.test:8884"
    assert (found.broker.username, found.broker.password) == ("d1", PASSWORD)
    assert found.broker.ca == board.root.resolve() / "etc/kedge/ca.pem"


def test_groups_that_the_service_asks_for_are_made(board: Board) -> None:
    """A unit whose group does not exist does not start."""
    drop_ins = (board.root / f"etc/systemd/system/{SERVICE}.d").glob("*.conf")
    asked = {group for path in drop_ins for line in re.findall(r"^SupplementaryGroups=(.*)$", path.read_text(), re.M)
             for group in line.split()}  # fmt: skip
    groups = set(re.findall(r"^([a-z]+):", (board.root / "etc/group").read_text(), re.MULTILINE))
    assert asked <= groups


@root_only
def test_installing_twice_is_installing_once(tmp_path: Path) -> None:
    unpacked = unpack(make_kit(tmp_path, "jetson-orin-nano"), tmp_path / "kit")
    root = empty_system(tmp_path / "root")
    assert install(unpacked, root).returncode == 0
    before = {path: path.read_bytes() for path in (root / "etc").rglob("*") if path.is_file()}
    done = install(unpacked, root)
    assert done.returncode == 0, done.stderr
    assert before == {path: path.read_bytes() for path in (root / "etc").rglob("*") if path.is_file()}


@root_only
def test_a_release_that_the_kit_does_not_hold_for_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    unpacked = unpack(make_kit(tmp_path, "rpi4"), tmp_path / "kit")
    for release in ("debian-12", "raspbian-12"):
        (unpacked / "packages" / release).rename(unpacked / "packages" / f"other-{release}")
    # Should it go on all the same, it must not get far.
    stand_in = tmp_path / "bin" / "apt-get"
    stand_in.parent.mkdir()
    stand_in.write_text("#!/bin/sh\nexit 99\n")
    stand_in.chmod(0o755)
    environment = os.environ | {"PATH": f"{stand_in.parent}:{os.environ['PATH']}"}
    command = ["sh", "install.sh"]
    done = subprocess.run(command, cwd=unpacked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the kit holds for: other-debian-12/ other-raspbian-12/" in done.stderr
    assert done.stdout == ""

"""What a kit installs: Kedge's own wheel and a lock with hashes of the board's platform, and nothing else."""

from __future__ import annotations

import email
import hashlib
import io
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib
from tests.conftest import ROOT
from tests.support.boards import make_kit, unpack
from tests.support.distributions import Environment, Wheels, outside, run

from kedge.fleet import agent_wheel
from kedge_protocol import __version__
from kedge_protocol.errors import MissingDependencyError
from kedge_targets import firmware
from kedge_targets import target as targets

sys.path.insert(0, str(ROOT / "tools"))
import lock_kits

PINNED = re.compile(r"([a-z0-9-]+)==([\w.!+-]+) \\\n    --hash=sha256:([0-9a-f]{64})\n")
BOARDS = list(lock_kits.boards())
DEPENDENCIES = {"numpy", "paho-mqtt", "click", "cryptography", "cffi", "pycparser"}


def pinned(text: str) -> dict[str, str]:
    """Name → version of a lock; every line is a comment or one of both."""
    left = PINNED.sub("", text)
    assert all(line.startswith("#") for line in left.splitlines()), left
    return {name: version for name, version, _ in PINNED.findall(text)}


def identity(board: lock_kits.Board) -> str:
    return board.lock.relative_to(ROOT / "firmware-configs").as_posix().removesuffix(".txt")


@pytest.mark.parametrize("board", BOARDS, ids=identity)
def test_a_lock_holds_all_that_the_board_needs_with_hashes(board: lock_kits.Board) -> None:
    text = board.lock.read_text()
    pins = pinned(text)
    asked = re.findall(r"^([a-z0-9-]+)(?:\[([a-z-]+)\])?", board.source.read_text(), re.M)
    listed = tomllib.loads((ROOT / "agent/pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = DEPENDENCIES | {re.split(r"[^a-z-]", one)[0] for _, extra in asked if extra for one in listed[extra]}
    needed |= {name for name, _ in asked if name != "kedge-agent"}
    if lock_kits.RELEASES[board.release][0] == "3.10":
        needed.add("tomli")
    assert needed - board.image <= set(pins)
    assert not board.image & set(pins)
    assert not {name for name in pins if name.startswith("kedge")}
    for name in board.image:
        assert name in text.splitlines()[1], "what the image brings is named at the top"


def test_every_release_of_every_target_has_its_lock_and_no_lock_is_forgotten() -> None:
    there = set((ROOT / "firmware-configs").rglob("lock-*.txt"))
    assert there == {board.lock for board in BOARDS}
    machines = {machine: name for name, machine in lock_kits.MACHINES.items()}
    for name in targets.names():
        files = firmware.files(name)
        releases = {path.split("/")[1] for path in files if path.endswith("/apt.txt")}
        for release in releases:
            locks = {path for path in files if path.startswith(f"packages/{release}/lock-")}
            assert locks, f"{name} on {release}"
        known = {re.sub(r".*lock-(\w+)\.txt", r"\1", path) for path in files if "/lock-" in path}
        architecture = targets.find(name).processor.architecture
        assert machines.get(architecture, architecture) in known, (name, architecture, known)
        assert not [path for path in files if path.endswith(".in")]


def test_the_kits_own_wheel_is_the_one_that_hatch_builds(wheels: Wheels) -> None:
    name, content = agent_wheel.build()
    assert name == wheels.agent.name
    built, own = zipfile.ZipFile(wheels.agent), zipfile.ZipFile(io.BytesIO(content))
    assert own.testzip() is None
    info = f"kedge_agent-{__version__}.dist-info"
    for member in set(built.namelist()) - {f"{info}/RECORD", f"{info}/WHEEL", f"{info}/METADATA"}:
        assert own.read(member) == built.read(member), member
    assert set(own.namelist()) == set(built.namelist())
    texts = [email.message_from_bytes(wheel.read(f"{info}/METADATA")) for wheel in (built, own)]
    assert texts[0].get_all("Requires-Dist") == texts[1].get_all("Requires-Dist")
    lines = own.read(f"{info}/RECORD").decode().splitlines()
    assert {line.split(",")[0] for line in lines} == set(own.namelist())


def test_where_another_agent_is_installed_no_kit_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    agent_wheel.build.cache_clear()
    monkeypatch.setattr(agent_wheel.kedge_protocol, "__version__", "9.9")
    with pytest.raises(MissingDependencyError, match=rf"kedge-agent is of version {__version__}.*of version 9\.9"):
        agent_wheel.build()


def steps(unpacked: Path, environment: Path) -> str:
    """The steps of install.sh that install Python packages, at work in another folder."""
    script = (unpacked / "install.sh").read_text()
    (found,) = re.findall(r"^  set -- --quiet.*?(?=^fi$)", script, re.M | re.S)
    assert "/opt/kedge" in found
    return "fail() { echo $1 >&2; exit 1; }\n" + found.replace("/opt/kedge", str(environment))


def installed(unpacked: Path, folder: Path, lock: str) -> subprocess.CompletedProcess[str]:
    program = steps(unpacked, folder / "venv").replace("$lock", lock)
    return subprocess.run(
        ["sh", "-euc", program], cwd=unpacked, env=outside(), capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="Debian 12 has Python 3.11")
def test_the_kits_steps_install_the_wheel_and_the_lock_and_nothing_else(tmp_path: Path) -> None:
    """In an environment that holds nothing but pip, as on the board; then the hash of one package is another."""
    kit = make_kit(tmp_path, "generic-cpu")
    with tarfile.open(kit) as tar:
        names = tar.getnames()
    assert "packages/pip.txt" not in names
    unpacked = unpack(kit, tmp_path / "kit")
    wheel = unpacked / "wheels" / f"kedge_agent-{__version__}-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert (unpacked / "packages/kedge.txt").read_text() == f"./wheels/{wheel.name} --hash=sha256:{digest}\n"
    lock = "packages/debian-12/lock-amd64.txt"
    environment = Environment(tmp_path)
    run(sys.executable, "-m", "venv", environment.folder / "venv", cwd=tmp_path)
    done = installed(unpacked, tmp_path, lock)
    assert done.returncode == 0, done.stderr
    environment.pip("check")
    assert environment.distributions() == {"kedge-agent", *pinned((unpacked / lock).read_text())}
    assert __version__ in run(environment.bin / "kedge-agent", "--version", cwd=tmp_path).stdout

    (unpacked / "wheels" / wheel.name).write_bytes(wheel.read_bytes() + b"\0")
    refused = installed(unpacked, tmp_path, lock)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr


@pytest.mark.campaign
@pytest.mark.parametrize("board", BOARDS, ids=identity)
def test_pip_would_take_each_locked_wheel_on_that_platform(board: lock_kits.Board) -> None:
    command = lock_kits.pip(board, "--require-hashes", "-r", str(board.lock))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]

"""Kits: what goes into them, what is refused, that the same is the same."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomllib
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import ROOT
from tests.support.boards import PASSWORD, authority, make_kit

from kedge.cli.main import main
from kedge.fleet.kit import KitOptions, Member, archive, fill_template, members, write
from kedge.fleet.service import FleetService
from kedge_protocol.errors import ConfigError, FleetError, KedgeError, StorageError, TargetError
from kedge_targets import firmware

TEMPLATE = (ROOT / "firmware-configs/raspberry-pi/agent.toml").read_text()
KEYS = (
    "device.name", "device.target", "broker.url", "broker.ca", "broker.cert", "broker.key", "broker.username",
    "broker.password_file",
)  # fmt: skip

BOARD = """
name = "my-board"
title = "A board of my own"
[processor]
architecture = "aarch64"
[system]
os = "Debian"
memory_bytes = 1_000_000_000
[[backends]]
name = "any"
"""


def content(tar: tarfile.TarFile, path: str) -> str:
    file = tar.extractfile(path)
    assert file is not None
    return file.read().decode()


def settings(files: dict[str, Member]) -> dict[str, Any]:
    return tomllib.loads(files["etc/kedge/agent.toml"].content.decode())


def test_a_kit_names_the_device_the_broker_and_its_credentials(tmp_path: Path) -> None:
    with tarfile.open(make_kit(tmp_path, "rpi4")) as tar:
        found = {entry.name: entry for entry in tar}
        agent = tomllib.loads(content(tar, "etc/kedge/agent.toml"))
        secret = content(tar, "etc/kedge/password")
    assert agent["device"] == {"name": "d1", "target": "rpi4"}
    assert agent["broker"] == {
        "url": "mqtts://broker.test:8884", "ca": "ca.pem", "username": "d1", "password_file": "password",
    }  # fmt: skip
    assert secret == f"{PASSWORD}\n"
    assert found["etc/kedge/password"].mode == 0o600
    assert found["etc/kedge/ca.pem"].mode == found["etc/kedge/agent.toml"].mode == 0o644
    assert found["install.sh"].mode == 0o755
    assert {"README.md", "etc/systemd/system/kedge-agent.service", "packages/debian-12/apt.txt"} <= set(found)


def test_the_password_is_in_its_own_file_only(tmp_path: Path) -> None:
    (tmp_path / "pw").write_text("hunter22\nsecond line\n")
    found = members("d1", "rpi4", KitOptions(password_file=tmp_path / "pw", broker="mqtts://b"))
    assert [path for path, file in found.items() if b"hunter22" in file.content] == ["etc/kedge/password"]
    assert found["etc/kedge/password"].content == b"hunter22\n"


def test_the_same_kit_has_the_same_bytes_and_no_times_and_is_for_its_owner_only(tmp_path: Path) -> None:
    kits = []
    for place in ("a", "b"):
        folder = tmp_path / place
        folder.mkdir()
        (folder / "pw").write_text("p\n")
        kits.append(folder / f"{place}.tar.gz")
        options = KitOptions(kit=kits[-1], broker="mqtts://b", username="u", password_file=folder / "pw")
        os.utime(folder / "pw", (1, 1 + len(kits)))
        write("d1", "rpi4", options)
    assert kits[0].read_bytes() == kits[1].read_bytes()
    assert stat.S_IMODE(kits[0].stat().st_mode) == 0o600
    with tarfile.open(kits[0]) as tar:
        entries = tar.getmembers()
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in entries} == {(0, 0, 0, "root")}
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)


def test_a_folder_stands_before_what_is_in_it() -> None:
    packed = archive({"etc/a/b": Member(b"x", 0o644), "c": Member(b"", 0o600)})
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        assert [(entry.name, entry.isdir()) for entry in tar] == [
            ("c", False), ("etc", True), ("etc/a", True), ("etc/a/b", False),
        ]  # fmt: skip


def test_without_a_broker_the_address_is_an_example_and_the_readme_says_so() -> None:
    found = members("d1", "rpi4", KitOptions())
    assert settings(found)["broker"] == {"url": "mqtts://broker.example:8883"}
    assert b"fill in `url`" in found["README.md"].content
    assert "etc/kedge/password" not in found


def test_a_board_of_ones_own_goes_along(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(BOARD)
    found = members("d1", str(path), KitOptions(like="rpi4"))
    assert settings(found)["device"] == {"name": "d1", "target": "./board.toml"}
    assert found["etc/kedge/board.toml"].content.decode() == BOARD
    with pytest.raises(TargetError, match=r"nothing in firmware-configs for target 'my-board'.*rpi4"):
        members("d1", str(path), KitOptions())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"broker": "http://b"}, "not a broker's address"),
        ({"broker": "mqtt://b", "ca": "ca.pem"}, "mqtt:// has no TLS"),
        ({"broker": "mqtts://b", "ca": "pw"}, "certificates cannot be used"),
        ({"broker": "mqtts://b", "key": "pw"}, "a key was given without"),
        ({"password_file": "absent"}, "cannot be read"),
        ({"password_file": "empty"}, "first line is empty"),
        ({"password_file": "pw", "username": "a\tb"}, "cannot be printed"),
        ({"like": "toaster"}, "nothing in firmware-configs"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_written(
    tmp_path: Path, options: dict[str, str], words: str
) -> None:
    (tmp_path / "pw").write_text("p\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "ca.pem").write_bytes(authority())
    paths = {"ca", "key", "password_file"}
    given = {key: tmp_path / value if key in paths else value for key, value in options.items()}
    kit = tmp_path / "kit.tar.gz"
    made: Callable[..., KitOptions] = KitOptions
    with pytest.raises(KedgeError, match=words):
        write("d1", "rpi4", made(kit=kit, **given))
    assert not kit.exists()


def test_a_kit_that_cannot_be_written_leaves_nothing_and_adds_no_device(tmp_path: Path) -> None:
    kit = tmp_path / "taken"
    kit.mkdir()
    with FleetService(tmp_path / "state") as fleet:
        with pytest.raises(StorageError, match="kit cannot be written"):
            fleet.device_add("d1", "rpi4", options=KitOptions(kit=kit))
        assert fleet.devices() == ()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        fleet.device_add("d1", "rpi4")
        with pytest.raises(FleetError, match="already"):
            fleet.device_add("d1", "rpi4", options=KitOptions(kit=tmp_path / "k.tar.gz"))
    assert not (tmp_path / "k.tar.gz").exists()


def test_credentials_without_a_kit_are_a_mistake() -> None:
    with pytest.raises(ConfigError, match="--password-file is of use in a kit only"):
        KitOptions(password_file=Path("x")).check()
    KitOptions().check()


def test_the_command_writes_the_kit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KEDGE_FLEET_STATE", str(tmp_path / "state"))
    kit = tmp_path / "kit.tar.gz"
    with pytest.raises(SystemExit) as ended:
        main(["device", "add", "d1", "--target", "rpi4", "--kit", str(kit), "--json"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["name"] == "d1"
    assert "is an example" in said.err
    assert tarfile.is_tarfile(kit)
    with pytest.raises(SystemExit) as ended:
        main(["device", "add", "d2", "--target", "rpi4", "--broker", "mqtts://b"])
    assert ended.value.code == 1
    assert "--broker is of use in a kit only" in capsys.readouterr().err


printable = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)


@given(st.fixed_dictionaries(dict.fromkeys(KEYS, st.none() | printable)))
def test_any_printable_values_come_back_and_all_else_stays(values: dict[str, str | None]) -> None:
    made = tomllib.loads(fill_template(TEMPLATE, values))
    original = tomllib.loads(TEMPLATE)
    for key, value in values.items():
        table, _, name = key.partition(".")
        assert made[table].pop(name, None) == value
        original[table].pop(name, None)
    assert made == original


def test_comments_stay_beside_their_lines() -> None:
    line = next(
        line for line in fill_template(TEMPLATE, {"broker.url": "mqtt://b"}).splitlines() if line.startswith("url")
    )
    assert line.startswith('url = "mqtt://b"  ')
    assert "# mqtt://… without TLS" in line


def test_a_file_without_the_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no table \[broker\]"):
        fill_template('[device]\nname = "x"\n', {"broker.url": "mqtt://b"})


def test_an_installed_kedge_finds_its_folder_within_itself(tmp_path: Path) -> None:
    """As the host's wheel has it: firmware-configs lies in kedge_targets."""
    source, place = "firmware-configs", "kedge_targets/firmware-configs"
    for package in ("targets/kedge_targets", "protocol/kedge_protocol"):
        (tmp_path / Path(package).name).symlink_to(ROOT / package)
    (tmp_path / "kedge_targets").unlink()
    (tmp_path / "kedge_targets").mkdir()
    for path in (ROOT / "targets/kedge_targets").iterdir():
        (tmp_path / "kedge_targets" / path.name).symlink_to(path)
    (tmp_path / place).symlink_to(ROOT / source)
    program = "from kedge_targets import firmware; print(firmware.folder()); print(len(firmware.files('rpi4')))"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder, count = done.stdout.split()
    assert folder == str(tmp_path / place)
    assert int(count) == len(firmware.files("rpi4"))


def test_without_the_folder_it_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(firmware, "_PLACES", (tmp_path,))
    with pytest.raises(StorageError, match="firmware-configs is missing"):
        firmware.folder()


def test_a_map_that_names_no_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kits.toml").write_text('[targets]\nrpi4 = ["nowhere"]\n')
    monkeypatch.setattr(firmware, "_PLACES", (tmp_path,))
    with pytest.raises(ConfigError, match="nowhere"):
        firmware.kits()

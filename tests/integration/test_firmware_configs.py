"""What a board is made ready with: units that systemd accepts, configurations that the agent reads, rules, lists."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from tests.conftest import ROOT as REPOSITORY
from tests.support.boards import authority

from kedge_agent import config
from kedge_targets import firmware
from kedge_targets import target as targets

ROOT = REPOSITORY / "firmware-configs"
BOARDS = sorted(path.parent.name for path in ROOT.glob("*/agent.toml"))
KITS = sorted(firmware.kits())
UNIT = ROOT / "common/root/etc/systemd/system/kedge-agent.service"
INSTALLED = "/opt/kedge/bin/kedge-agent"
POWER = ROOT / "jetson/root/usr/local/lib/kedge/jetson-power"


def _service() -> dict[str, str]:
    _, _, section = UNIT.read_text().partition("[Service]\n")
    lines = section.partition("[Install]")[0].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_every_target_has_what_makes_its_board_ready() -> None:
    assert firmware.folder() == ROOT
    for name in targets.names():
        files = firmware.files(name)
        assert {"agent.toml", "README.md", "install.sh", "packages/venv-options.txt"} <= set(files), name
        assert "etc/systemd/system/kedge-agent.service" in files
        releases = {path.split("/")[1] for path in files if path.endswith("/apt.txt")}
        assert releases, name
        assert name in files["README.md"].read_text(), f"the README of {name} does not name it"


def test_no_folder_is_forgotten() -> None:
    used = {layer.relative_to(ROOT).parts[0] for name in KITS for layer in firmware.layers(name)}
    assert used == {path.name for path in ROOT.iterdir() if path.is_dir()}


def test_kits_are_for_targets_that_there_are() -> None:
    assert set(targets.names()) == set(KITS)


def test_the_unit_restarts_watches_and_limits() -> None:
    service = _service()
    assert service["Type"] == "notify"
    assert service["Restart"] == "always"
    assert int(service["WatchdogSec"]) > 0
    assert service["StateDirectory"] == "kedge"
    assert service["OOMPolicy"] == "continue"
    assert "MemoryMax" in service
    assert service["ExecStart"] == f"{INSTALLED} run --config /etc/kedge/agent.toml"


@pytest.mark.parametrize("board", BOARDS)
def test_the_agent_reads_the_configuration(board: str, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_bytes((ROOT / board / "agent.toml").read_bytes())
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "ca.pem").write_bytes(authority())
    found = config.read(tmp_path / "agent.toml")
    assert found.state == Path("/var/lib/kedge")
    assert found.listen == "127.0.0.1:8080"
    assert board in {layer.name for layer in firmware.layers(found.target)}
    assert found.broker.password == "secret"


@pytest.mark.parametrize("name", KITS)
def test_lists_hold_names_of_packages(name: str) -> None:
    for path, file in firmware.files(name).items():
        if not path.startswith("packages/"):
            continue
        entries = [line.split("#")[0].strip() for line in file.read_text().splitlines()]
        pattern = {
            "apt.txt": r"[a-z0-9][a-z0-9.+-]+",
            "venv-options.txt": r"--[a-z-]+",
        }.get(file.name, r"[a-z0-9-]+==[0-9.]+ \\|--hash=sha256:[0-9a-f]{64}")
        assert all(re.fullmatch(pattern, entry) for entry in entries if entry), path
    releases = {path.split("/")[1] for path in firmware.files(name) if path.endswith("/apt.txt")}
    assert all(re.fullmatch(r"(debian|raspbian|ubuntu)-[0-9.]+", release) for release in releases)


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.rules")), ids=lambda path: path.name)
def test_udev_rules_are_well_formed(path: Path) -> None:
    """udev(7): keys with operators, values in quotes, separated by commas; a rule must set something."""
    rules = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    assert rules
    for rule in rules:
        parts = [part.strip() for part in rule.split(",")]
        found = [re.fullmatch(r'([A-Z]+)(\{\w+\})?(==|!=|=|\+=|:=)"[^"]*"', part) for part in parts]
        assert all(found), rule
        keys = {part[1]: part[3] for part in found if part is not None}
        assert keys["GROUP"] == keys["MODE"] == "="
        assert keys["SUBSYSTEM"] == "=="


def test_movidius_is_known_before_and_after_its_firmware() -> None:
    (path,) = ROOT.glob("movidius/root/etc/udev/rules.d/*.rules")
    rule = path.read_text().splitlines()[-1]
    assert 'ATTR{idVendor}=="03e7"' in rule
    assert {"2485", "f63b"} <= set(re.findall(r"[0-9a-f]{4}", rule))
    assert 'MODE="0660"' in rule
    # uaccess is looked at by 73-seat-late.rules.
    assert path.name < "73"


@pytest.mark.parametrize("path", [*sorted(ROOT.rglob("*.sh")), POWER], ids=lambda path: path.name)
def test_scripts_are_shell(path: Path) -> None:
    assert path.read_text().startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n", str(path)], check=True)


# What `nvpmodel` says, from reports of users: -q answers with the name and the number; a mode that gates parts of the
# GPU asks for a reboot, and without an answer the mode stays.
_NVPMODEL = """#!/bin/sh
case "$1" in
  -q) echo "NV Power Mode: x"; cat "$STATE/mode" ;;
  -m)
    if [ "$2" = 3 ]; then
      echo "NVPM WARN: Reboot required for changing to this power mode: 3"
      echo "NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm: "
      read -r answer || { echo "NVPM ERROR: bad input!"; exit 255; }
      touch "$STATE/rebooted"
    fi
    echo "$2" > "$STATE/mode"; echo "$2" >> "$STATE/asked" ;;
esac
"""


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """Stand-ins of NVIDIA's two programs, and a board in mode 0."""
    for name, text in (("nvpmodel", _NVPMODEL), ("jetson_clocks", '#!/bin/sh\ntouch "$STATE/clocks"\n')):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    (tmp_path / "nvpmodel.conf").write_text(
        "< PARAM TYPE=FILE NAME=CPU_ONLINE >\n< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n"
        "< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n< POWER_MODEL ID=3 NAME=7W >\n< PM_CONFIG DEFAULT=0 >\n"
    )
    (tmp_path / "mode").write_text("0\n")
    return tmp_path


def _power(jetson: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | settings
    environment |= {"PATH": f"{jetson / 'bin'}:{os.environ['PATH']}", "STATE": str(jetson)}
    environment["NVPMODEL_CONF"] = str(jetson / "nvpmodel.conf")
    return subprocess.run(["sh", str(POWER)], capture_output=True, text=True, env=environment, check=False)


def test_a_power_mode_is_set_by_its_name_and_clocks_are_fixed(jetson: Path) -> None:
    done = _power(jetson, POWER_MODE="MAXN_SUPER", CLOCKS="max")
    assert done.returncode == 0, done.stderr
    assert (jetson / "mode").read_text() == "2\n"
    assert (jetson / "clocks").exists()


def test_a_mode_that_is_set_already_is_left_alone(jetson: Path) -> None:
    assert _power(jetson, POWER_MODE="15W", CLOCKS="dynamic").returncode == 0
    assert not (jetson / "asked").exists()
    assert not (jetson / "clocks").exists()


def test_a_mode_that_the_board_has_not_is_refused_with_those_it_has(jetson: Path) -> None:
    done = _power(jetson, POWER_MODE="MODE_30W")
    assert done.returncode == 1
    assert "has no mode MODE_30W, only: 15W MAXN_SUPER 7W" in done.stderr


def test_a_mode_that_needs_a_reboot_is_refused_and_nothing_reboots(jetson: Path) -> None:
    done = _power(jetson, POWER_MODE="7W", CLOCKS="max")
    assert done.returncode == 1
    assert "needs a reboot: run sudo nvpmodel -m 3" in done.stderr
    assert not (jetson / "rebooted").exists()
    assert (jetson / "mode").read_text() == "0\n"


def test_the_settings_as_they_come_keep_the_mode(jetson: Path) -> None:
    lines = (ROOT / "jetson/root/etc/kedge/jetson.conf").read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    assert settings == {"POWER_MODE": "", "CLOCKS": "max"}
    assert _power(jetson, **settings).returncode == 0
    assert not (jetson / "asked").exists()

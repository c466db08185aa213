"""What a Jetson tells of itself, read from a copy of its files; other devices tell nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge_agent.telemetry import Meter
from kedge_protocol import codec
from kedge_protocol.messages import Telemetry
from kedge_targets import jetson


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    """The files of a Jetson Orin Nano, as far as they are read."""
    files = {
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
        "sys/class/devfreq/15340000.vic/device/of_node/name": "vic\0",
        "sys/class/devfreq/15340000.vic/device/load": "999\n",
        "sys/class/devfreq/17000000.gpu/device/of_node/name": "gpu\0",
        "sys/class/devfreq/17000000.gpu/device/load": "374\n",
        "sys/class/hwmon/hwmon0/name": "thermal\n",
        "sys/class/hwmon/hwmon0/in1_label": "WRONG\n",
        "sys/class/hwmon/hwmon1/name": "ina3221\n",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
        "sys/class/hwmon/hwmon1/in1_input": "4952\n",
        "sys/class/hwmon/hwmon1/curr1_input": "1000\n",
        "sys/class/hwmon/hwmon1/in2_label": "VDD_CPU_GPU_CV\n",
        "sys/class/hwmon/hwmon1/in2_input": "4944\n",
        "sys/class/hwmon/hwmon1/curr2_input": "104\n",
        "sys/class/hwmon/hwmon1/in3_label": "NC\n",
        "sys/class/hwmon/hwmon1/in3_input": "0\n",
        "sys/class/hwmon/hwmon1/curr3_input": "0\n",
        "sys/class/hwmon/hwmon1/in7_label": "sum of shunt voltages\n",
        "sys/class/hwmon/hwmon1/in7_input": "8\n",
        "sys/class/hwmon/hwmon1/curr7_input": "8\n",
        "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
        "sys/class/thermal/thermal_zone0/temp": "48531\n",
        "sys/class/thermal/thermal_zone1/type": "gpu-thermal\n",
        "sys/class/thermal/thermal_zone1/temp": "46062\n",
        "sys/class/thermal/thermal_zone2/type": "cv0-thermal\n",
        "sys/class/thermal/thermal_zone2/temp": "-256000\n",
        "var/lib/nvpmodel/status": "pmode:0001\n",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=1 NAME=7W >\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_all_figures(orin: Path) -> None:
    assert jetson.look(orin) == jetson.Figures(
        gpu_percent=37.4,
        power_mw={"VDD_IN": 4952, "VDD_CPU_GPU_CV": 514},
        temperatures_c={"cpu": 48.5, "gpu": 46.1},
        power_mode="7W",
    )


@pytest.mark.parametrize(
    ("missing", "field", "left"),
    [
        ("sys/class/devfreq/17000000.gpu/device/load", "gpu_percent", None),
        ("sys/class/hwmon/hwmon1/curr1_input", "power_mw", {"VDD_CPU_GPU_CV": 514}),
        ("sys/class/thermal/thermal_zone0/temp", "temperatures_c", {"gpu": 46.1}),
        ("etc/nvpmodel.conf", "power_mode", "1"),
        ("var/lib/nvpmodel/status", "power_mode", None),
    ],
)
def test_what_cannot_be_read_is_left_out(orin: Path, missing: str, field: str, left: object) -> None:
    (orin / missing).unlink()
    found = jetson.look(orin)
    assert found is not None
    assert getattr(found, field) == left


def test_rubbish_is_left_out(orin: Path) -> None:
    (orin / "sys/class/devfreq/17000000.gpu/device/load").write_text("busy\n")
    (orin / "sys/class/thermal/thermal_zone1/temp").write_bytes(b"\xff\xfe\n")
    (orin / "var/lib/nvpmodel/status").write_text("")
    found = jetson.look(orin)
    assert found is not None
    assert (found.gpu_percent, found.temperatures_c, found.power_mode) == (None, {"cpu": 48.5}, None)


@pytest.mark.parametrize("compatible", [None, "raspberrypi,4-model-b\0brcm,bcm2711\0"])
def test_other_devices_tell_nothing(orin: Path, compatible: str | None) -> None:
    path = orin / "proc/device-tree/compatible"
    path.unlink()
    if compatible is not None:
        path.write_text(compatible)
    assert jetson.look(orin) is None


def test_telemetry_carries_them_over_the_wire(orin: Path, tmp_path: Path) -> None:
    meter = Meter(tmp_path / "state", "boot", 0.0, root=orin)
    sent = meter.measure({}, [], 0, 1.0)
    there = codec.decode(codec.encode(sent), Telemetry, where="test")
    assert there.board == sent.board
    assert there.board is not None
    assert there.board.power_mw["VDD_IN"] == 4952
    assert there.board.power_mode == "7W"


def test_telemetry_of_other_devices_says_nothing_of_a_board(tmp_path: Path) -> None:
    sent = Meter(tmp_path / "state", "boot", 0.0, root=tmp_path).measure({}, [], 0, 1.0)
    assert sent.board is None
    assert b"board" not in codec.encode(sent)

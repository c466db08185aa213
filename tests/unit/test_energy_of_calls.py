"""Energy comes from a sensor or is not told: RAPL's counters with their overflow, a Jetson's power, and neither."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install

from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.running_figures import RunningFigures
from kedge_targets import raspberry_pi
from kedge_targets.energy import EnergyMeter, Spending

pytestmark = pytest.mark.device


def package(root: Path, number: int, microjoules: int, *, most: int = 1_000_000) -> None:
    folder = root / "sys/class/powercap" / f"intel-rapl:{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most - 1}\n")


def test_counters_of_all_packages_are_summed_beyond_their_range(tmp_path: Path) -> None:
    package(tmp_path, 0, 900_000)
    package(tmp_path, 1, 100_000)
    (tmp_path / "sys/class/powercap/intel-rapl:0:0").mkdir()  # a part of package 0
    meter = EnergyMeter(tmp_path)
    meter.sample(0.0)
    assert meter.joules == 0
    package(tmp_path, 0, 100_000)
    package(tmp_path, 1, 150_000)
    meter.sample(1.0)
    assert meter.joules == pytest.approx(0.25)


def test_without_a_sensor_no_energy_is_told(tmp_path: Path) -> None:
    meter = EnergyMeter(tmp_path)
    for second in range(3):
        meter.sample(float(second))
    assert meter.joules is None
    package(tmp_path, 0, 1)
    (tmp_path / "sys/class/powercap/intel-rapl:0/energy_uj").write_text("not for you")
    hidden = EnergyMeter(tmp_path)
    for second in range(3):
        hidden.sample(float(second))
    assert hidden.joules is None


def test_the_power_of_a_jetsons_module_is_summed_over_time(tmp_path: Path) -> None:
    for name, text in {
        "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0",
        "sys/class/hwmon/hwmon1/name": "ina3221\n",
        "sys/class/hwmon/hwmon1/in1_label": "VDD_IN\n",
        "sys/class/hwmon/hwmon1/in1_input": "5000\n",
        "sys/class/hwmon/hwmon1/curr1_input": "1000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    meter = EnergyMeter(tmp_path)
    meter.sample(10.0)
    (tmp_path / "sys/class/hwmon/hwmon1/curr1_input").write_text("2000\n")
    meter.sample(12.0)
    assert meter.joules == pytest.approx(15.0)


RAILS = """\
     3V7_WL_SW_A current(0)=0.00195190A
       3V3_SYS_A current(1)=0.06050000A
      VDD_CORE_A current(7)=1.50000000A
     3V7_WL_SW_V volt(8)=3.72000000V
       3V3_SYS_V volt(9)=3.30000000V
      VDD_CORE_V volt(15)=0.80000000V
         EXT5V_V volt(24)=5.15192600V
          BATT_V volt(25)=0.00000000V
"""
"""In the form that Raspberry Pi documents for ``vcgencmd pmic_read_adc``, shortened."""


def test_the_power_of_a_pi_is_that_of_the_rails_with_current_and_voltage() -> None:
    expected = 0.0019519 * 3.72 + 0.0605 * 3.3 + 1.5 * 0.8
    assert raspberry_pi.sum_of_rails(RAILS) == pytest.approx(expected)
    for nothing in ("", 'error=1 error_msg="Command not registered"', "VDD_CORE_A current(7)=A\nEXT5V_V volt(24)=5V"):
        assert raspberry_pi.sum_of_rails(nothing) is None


def test_the_power_of_a_pi_is_summed_over_time_by_its_own_program(tmp_path: Path) -> None:
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_text("raspberrypi,5-model-b\0brcm,bcm2712\0")
    assert EnergyMeter(tmp_path).joules is None, "without vcgencmd"
    program = tmp_path / "usr/bin/vcgencmd"
    program.write_text(f"#!/bin/sh\n[ $1 = pmic_read_adc ] && cat <<'END'\n{RAILS}END\n")
    program.chmod(0o755)
    watts = raspberry_pi.sum_of_rails(RAILS)
    assert watts is not None
    meter = EnergyMeter(tmp_path)
    for second in (0.0, 1.0, 10.0):
        meter.sample(second)
    assert meter.joules == pytest.approx(10 * watts, rel=1e-4)
    program.write_text("#!/bin/sh\necho 'Can not open /dev/vcio: Permission denied'\nexit 1\n")
    meter = EnergyMeter(tmp_path)
    for second in (0.0, 10.0, 20.0):
        meter.sample(second)
    assert meter.joules is None


def test_what_this_process_spends_is_processor_time_and_its_part_of_the_energy(tmp_path: Path) -> None:
    assert Spending(root=tmp_path).so_far()[1] is None
    package(tmp_path, 0, 0)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  100 0 100 5000 10 0 0 0 0 0\n")
    spending = Spending(root=tmp_path)
    sum(range(300_000))
    package(tmp_path, 0, 500_000)
    (tmp_path / "proc/stat").write_text("cpu  100000 0 200 9000 10 0 0 0 0 0\n")
    seconds, joules = spending.so_far()
    assert seconds > 0
    assert joules == pytest.approx(0.5 * seconds / 1000, rel=0.1)


@pytest.mark.parametrize("sensor", [True, False])
def test_a_call_costs_its_share_of_the_processors_time_and_energy(tmp_path: Path, sensor: bool) -> None:
    if sensor:
        package(tmp_path, 0, 0)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  100 0 100 5000 10 0 0 0 0 0\n")
    install(tmp_path / "state", make_bundle(tmp_path))
    models = ServedModels(tmp_path / "state")
    models.scan()
    entry = models.get("tiny")
    assert entry is not None
    assert entry.model is not None
    figures = RunningFigures(EnergyMeter(tmp_path), root=tmp_path)
    counts = entry.statistics.mine()
    for _ in range(10):
        entry.model(samples(1))
        counts.record(samples=1, queue=0, input=0, infer=1000, output=0)
    if sensor:
        package(tmp_path, 0, 500_000)
    # Everybody has worked for 1000 seconds, this process for a little of it.
    (tmp_path / "proc/stat").write_text("cpu  100000 0 200 9000 10 0 0 0 0 0\n")
    figures.renew({"tiny": entry}, period=0.0)
    assert entry.report is not None
    told = entry.report.figures
    assert told["cpu_ms_per_inference"] > 0
    assert ("joules_per_inference" in told) == sensor
    if sensor:
        assert 0 <= told["joules_per_inference"] < 0.05

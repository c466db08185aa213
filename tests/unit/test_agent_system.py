"""Figures of the device from files as the kernel writes them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from kedge_agent import system
from kedge_agent.runtimes import installed_runtimes
from kedge_agent.systemd import notify
from kedge_protocol import memory

pytestmark = pytest.mark.device


def test_memory_is_read_in_bytes(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text(
        "MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:    400 kB\nHugePages_Total: 0\n"
    )
    assert memory.of_device(tmp_path) == memory.DeviceMemory(1000 * 1024, 400 * 1024)
    assert memory.of_device(tmp_path / "absent") == memory.DeviceMemory(0, 0)
    here = memory.of_device()
    assert 0 < here.available <= here.total


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/system.slice/kedge-agent.service", "system.slice", ("memory.max", "memory.current", "inactive_file")),
        ("0::/", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "5:cpuset,memory:/docker/4f1e",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["a slice around the service", "a container", "a container of the first kind"],
)
def test_a_limit_of_the_container_or_service_counts(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    proc, group = tmp_path / "proc", tmp_path / "cgroup" / folder
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 400 kB\n")
    (proc / "self" / "cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    group.mkdir(parents=True)
    limit, used, given_back = names
    (group / limit).write_text("300000\n")
    (group / used).write_text("200000\n")
    (group / "memory.stat").write_text(f"anon 1\n{given_back} 50000\nactive_file 9\n")
    assert memory.of_device(proc, tmp_path / "cgroup") == memory.DeviceMemory(300_000, 150_000)
    (group / limit).write_text("max\n")
    assert memory.of_device(proc, tmp_path / "cgroup") == memory.DeviceMemory(1000 * 1024, 400 * 1024)


def test_processor_time_between_two_looks(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 1 1 1\n")
    meter = system.CpuMeter(tmp_path)
    assert meter.percent() == 0.0
    (tmp_path / "stat").write_text("cpu  130 0 120 750 100 0 0 0 0 0\n")
    assert meter.percent() == 50.0
    assert meter.percent() == 0.0


def test_the_hottest_plausible_zone_counts(tmp_path: Path) -> None:
    assert system.temperature(tmp_path) is None
    for index, value in enumerate(("48312", "61000", "-274000", "x")):
        zone = tmp_path / f"thermal_zone{index}"
        zone.mkdir()
        (zone / "temp").write_text(value)
    assert system.temperature(tmp_path) == 61.0


def test_resident_memory_of_processes_that_are_there() -> None:
    mine = system.resident_bytes([os.getpid()])
    assert mine > 1 << 20
    assert system.resident_bytes([os.getpid(), 2**22 + 1]) == pytest.approx(mine, rel=0.2)


def test_the_service_manager_is_told_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify("READY=1")
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(path)
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", path)
        notify("READY=1")
        assert manager.recv(100) == b"READY=1"
    notify("WATCHDOG=1")


@pytest.mark.parametrize(
    "metadata", [None, b"", b"Name: x\n", b"Version: \n", b"Version: 1\xff2\n", b"Version: \xe2\x80\xa8\n"]
)
def test_a_distribution_without_a_version_counts_as_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, metadata: bytes | None
) -> None:
    folder = tmp_path / "halfremoved-1.0.dist-info"
    folder.mkdir()
    (folder / "RECORD").write_text("")
    if metadata is not None:
        (folder / "METADATA").write_bytes(metadata)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "halfremoved" not in installed_runtimes(("halfremoved", "pytest"))
    assert installed_runtimes(("pytest",))

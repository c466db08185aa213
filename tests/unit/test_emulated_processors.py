"""Which processor is emulated for a target, and what the emulated system is made with."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from kedge.compiler import emulated_proof
from kedge_protocol.errors import ToolchainError
from kedge_targets import registry, target
from kedge_targets.emulation import proving
from kedge_targets.toolchain import declaration, foreign_system


@pytest.mark.parametrize(
    ("name", "cpu"),
    [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76"), ("generic-arm", "cortex-a53"), ("generic-cpu", None)],
)
def test_a_target_is_emulated_by_a_processor_with_its_instructions(
    name: str, cpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert proving.processor_of(target.find(name)) == cpu
    assert cpu is None or cpu in foreign_system.PARTS


def test_a_machine_of_the_targets_kind_emulates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert proving.processor_of(target.find("rpi4")) is None


def test_without_the_emulated_system_nothing_is_emulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path))
    assert not proving.installed()
    with pytest.raises(ToolchainError) as caught:
        proving.prove("cortex-a72", proving.EmulationRequest(folder="f", config="c"))
    assert "kedge toolchain install aarch64" in str(caught.value.remedy)


def test_without_qemu_the_installation_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError) as caught:
        foreign_system.make(declaration.read(declaration.EMULATED), tmp_path / "system", lambda command: None)
    assert "qemu-user" in str(caught.value.remedy)
    assert not (tmp_path / "system").exists()


def test_the_runtimes_are_those_of_a_device() -> None:
    lock = declaration.read(declaration.EMULATED).lock.read_text(encoding="utf-8")
    device = (Path(__file__).parents[2] / "constraints" / "device.txt").read_text(encoding="utf-8")
    for backend in target.find("rpi5").backends[:2]:
        (name,) = [one for one in registry.runtime(backend.name).distributions if proving.runs([one])]
        (version,) = re.findall(rf"^{name}==(\S+)", lock, re.MULTILINE)
        assert f"{name}=={version}" in device


def test_the_emulated_python_is_found_beside_the_program_that_starts_it(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "python"
    program.write_text(foreign_system.WRAPPER, encoding="utf-8")
    program.chmod(0o755)
    recorder = tmp_path / "path" / "qemu-aarch64"
    recorder.parent.mkdir()
    recorder.write_text('#!/bin/sh\necho "$@"; echo "$PYTHONPATH"\n', encoding="utf-8")
    recorder.chmod(0o755)
    environment = {"PATH": f"{recorder.parent}{os.pathsep}{os.environ['PATH']}", "KEDGE_EMULATED_CPU": "cortex-a76"}
    ran = subprocess.run([program, "-c", "1"], capture_output=True, text=True, check=True, env=environment)
    system = tmp_path / "systems" / "cortex-a76"
    assert ran.stdout.splitlines() == [
        f"-cpu cortex-a76 -L {system} {system}/usr/bin/python3.11 -c 1",
        str(tmp_path / "site"),
    ]


def test_answers_are_compared_over_the_samples_that_ran() -> None:
    wanted = np.arange(40, dtype=np.float32).reshape(10, 4)
    assert emulated_proof._decibels(wanted, wanted[:6]) == 200
    noisy = wanted[:6] * np.float32(1.1)
    assert emulated_proof._decibels(wanted, noisy) == pytest.approx(20, abs=0.01)
    assert emulated_proof._decibels(wanted, np.zeros((6, 3), np.float32)) is None

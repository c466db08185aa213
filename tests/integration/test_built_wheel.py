"""The built wheel in an environment of its own: what an agent needs and no more, and the files that belong to it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.conftest import ROOT


def run(*argv: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in argv], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("kedge-*.whl")
    return built


def test_the_wheel_holds_the_four_packages_their_data_and_the_firmware_configs(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("kedge", "kedge_agent", "kedge_targets", "kedge_protocol"):
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    tracked = subprocess.run(
        ["git", "ls-files", "firmware-configs", "targets/kedge_targets/devices"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for path in tracked:
        inside = path.replace("targets/", "", 1) if path.startswith("targets/") else f"kedge_targets/{path}"
        assert inside in names, path
    assert any(name.endswith("toolchain/requirements.txt") for name in names)
    assert "kedge/compiler/report.html.j2" in names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)


def test_the_base_install_runs_an_agent_and_says_what_a_compiler_needs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    run(environment / "bin" / "python", "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    listed = run(environment / "bin" / "python", "-m", "pip", "list", "--format=freeze", cwd=tmp_path)
    installed = {line.partition("==")[0].lower().replace("_", "-") for line in listed.split()}
    allowed = {"cffi", "click", "cryptography", "kedge", "numpy", "paho-mqtt", "pip", "pycparser"}
    assert installed <= allowed | {"setuptools"}, installed
    assert "0.1.0" in run(environment / "bin" / "kedge-agent", "--version", cwd=tmp_path)
    assert "rpi4" in run(environment / "bin" / "kedge", "target", "list", cwd=tmp_path)
    arguments = "compile model.onnx --name n --version 1 --target rpi4 --calibration c.npz --evaluation e.npz -o OUT"
    refused = subprocess.run(
        [environment / "bin" / "kedge", *arguments.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode != 0
    assert "kedge[compile]" in refused.stderr
    assert "Traceback" not in refused.stderr

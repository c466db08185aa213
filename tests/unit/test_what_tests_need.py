"""A test whose need is missing says what to install; under CI it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

TESTS = """
import pytest

@pytest.mark.needs("docker-registry", "no-such-program")
def test_program(): raise AssertionError("never reached")

@pytest.mark.packages("json", "no_such_package")
def test_package(): raise AssertionError("never reached")

@pytest.mark.shared_data
def test_mark(): raise AssertionError("never reached")

def test_fixture(shared_data): raise AssertionError("never reached")

def test_toolchain():
    from kedge_targets import toolchain
    toolchain.find("tflite")

def test_toolchain_of_a_child():
    assert False, "error: the toolchain 'finn' is not installed"

@pytest.mark.needs("hidden")
def test_there(): pass
"""


@pytest.mark.parametrize("ci", ["", "true"])
def test_what_is_missing_is_named_with_its_remedy(ci: str, tmp_path: Path) -> None:
    (tmp_path / "test_of_another.py").write_text(TESTS)
    for name in ("docker-registry", "hidden"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "CI": ci,
        "KEDGE_DATA": str(tmp_path),
        "KEDGE_SHARED": str(tmp_path / "absent"),
        "PATH": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(one for one in sys.path if one)]),
    }
    plugins = ("tests.support.requirements", "no:cacheprovider", "no:hypothesispytest", "no:xdist")
    command = [sys.executable, "-m", "pytest", "-rsE", *(part for one in plugins for part in ("-p", one))]
    ran = subprocess.run(
        [*command, "--rootdir", ".", "."], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == bool(ci), ran.stdout
    counts = re.sub(r"\d+ warnings, ", "", ran.stdout)
    assert ("2 failed, 1 passed, 4 errors" if ci else "1 passed, 6 skipped") in counts
    assert "the program 'no-such-program' is missing: sudo apt-get install no-such-program" in ran.stdout
    assert "the package 'no_such_package' is missing: make setup" in ran.stdout
    assert ci or "the toolchain 'tflite' is missing: kedge toolchain install tflite" in ran.stdout
    assert ci or "the toolchain 'finn' is missing: kedge toolchain install finn" in ran.stdout
    assert ran.stdout.count("the shared data is missing: put it in ../shared/data") >= 2

"""Tests that run side by side: their reports, and what they share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

TESTS = """
import os
import time
from pathlib import Path
import pytest
from tests.support import parallel

def made(folder):
    (folder / "file").write_text(str(os.getpid()))
    time.sleep(0.2)
    return folder, os.getpid()

def test_shared():
    folder, pid = parallel.once("thing", made)
    assert (folder / "file").read_text() == str(pid)
    with Path("made-by").open("a") as file:
        file.write(f"{os.getpid()} {pid}\\n")
    time.sleep(0.5)

def test_damaged_name(): assert "\\udc80" == ""

def test_skipped(): pytest.skip("no such thing \\udc80")
"""


def test_two_processes_share_what_one_made_and_report_all(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(TESTS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *(one for one in sys.path if one)])
    plugins = ("tests.support.parallel", "no:cacheprovider", "no:hypothesispytest")
    command = [sys.executable, "-m", "pytest", "-rs", *(part for one in plugins for part in ("-p", one))]
    ran = subprocess.run(
        [*command, "-n", "2", "--dist", "loadfile", "--rootdir", ".", "."],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "2 failed, 2 passed, 2 skipped" in ran.stdout.replace(" 1 warning,", "")
    assert "no such thing \\udc80" in ran.stdout
    lines = [line.split() for line in (tmp_path / "made-by").read_text().splitlines()]
    assert len({maker for _, maker in lines}) == 1
    assert len({process for process, _ in lines}) == 2

"""Workflows run what the Makefile has, on every Python that is promised; ``make lint`` reads their schema."""

from __future__ import annotations

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from tests.conftest import ROOT

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))


def jobs() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted((ROOT / ".github" / "workflows").glob("*.yml")):
        found |= yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return found


def test_each_step_runs_a_target_of_the_makefile() -> None:
    lines = [
        re.sub(r"\$\{\{.*?\}\}", "X", step["run"]) for job in jobs().values() for step in job["steps"] if "run" in step
    ]
    made = {word for line in lines if line.startswith("make ") for word in shlex.split(line)[1:] if "=" not in word}
    assert {"check", "lint", "docs", "coverage", "test-host", "test-device"} <= made <= TARGETS


def test_each_job_has_a_time_limit_and_may_only_read() -> None:
    assert all("timeout-minutes" in job for job in jobs().values())
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        assert yaml.safe_load(path.read_text(encoding="utf-8"))["permissions"] == {"contents": "read"}


def test_host_and_device_are_tested_on_each_python_that_is_promised() -> None:
    matrices = {name: job["strategy"]["matrix"]["python"] for name, job in jobs().items() if "strategy" in job}
    assert matrices == {"host": ["3.11", "3.12", "3.13"], "device": ["3.10", "3.11", "3.12", "3.13"]}


def test_every_target_that_help_names_is_there() -> None:
    assert set(re.findall(r'@echo "make ([a-z-]+)', MAKEFILE)) <= TARGETS


@pytest.mark.campaign
def test_workflows_compose_file_dockerfile_and_scripts_pass_their_linters() -> None:
    done = subprocess.run(["make", "lint"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

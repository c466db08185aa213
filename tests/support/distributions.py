"""Both wheels of this tree, built once a session, and environments of their own to install them in."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support import parallel


def outside() -> dict[str, str]:
    """This process's environment without this checkout; pip compiles no modules, of which most are never
    imported (pip wants a falsy value for that)."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_NO_COMPILE": "0"}


def run(*argv: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A program without this checkout on its path."""
    environment = outside()
    done = subprocess.run(
        [str(part) for part in argv], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert not check or done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done


@dataclass(frozen=True)
class Wheels:
    """The files of both distributions."""

    agent: Path
    host: Path


@pytest.fixture(scope="session")
def wheels() -> Wheels:
    return parallel.once("wheels", _built)


def _built(out: Path) -> Wheels:
    for project in ("agent", "host"):
        command = (sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", out, ROOT / project)
        run(*command, cwd=out)
    (agent,), (host,) = out.glob("kedge_agent-*.whl"), out.glob("kedge_host-*.whl")
    return Wheels(agent, host)


class Environment:
    """A fresh virtual environment with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
        self.bin = folder / "venv" / "bin"

    def pip(self, *arguments: str | Path) -> str:
        """This Python's pip, at work on that environment."""
        command = (sys.executable, "-m", "pip", "--python", self.bin / "python", "--disable-pip-version-check")
        return run(*command, *arguments, cwd=self.folder).stdout

    def install(self, *requirements: str | Path, constraints: str) -> None:
        """Install with one of the README's sets of versions; what is installed must fit together."""
        self.pip("install", "--quiet", "-c", ROOT / "constraints" / constraints, *requirements)
        self.pip("check")

    def python(self, program: str, *arguments: str | Path) -> str:
        """Run a program; nothing of this checkout is seen."""
        return run(self.bin / "python", "-P", "-c", program, *arguments, cwd=self.folder).stdout

    def distributions(self) -> set[str]:
        listed = self.pip("list", "--format=freeze").split()
        return {line.partition("==")[0].lower().replace("_", "-") for line in listed} - {"pip", "setuptools"}

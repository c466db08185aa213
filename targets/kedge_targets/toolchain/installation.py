"""Builds an environment in a temporary place, tries it out, and moves it into place with one rename."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kedge_protocol.errors import KedgeError, ToolchainError
from kedge_protocol.packages import version_numbers
from kedge_protocol.progress import ignore_progress
from kedge_targets.toolchain import declaration, foreign_system, store
from kedge_targets.toolchain.declaration import Declaration
from kedge_targets.toolchain.store import Toolchain
from kedge_targets.worker import OnProgress

OnLine = Callable[[str], None]

_TRY_SECONDS = 600.0
_ASK_SECONDS = 30.0


@dataclass(frozen=True)
class Versions:
    """A driver's answer to its task ``version``: the Python version and the packages that it uses."""

    python: str
    packages: dict[str, str] = field(default_factory=dict)


def install(name: str, on_progress: OnProgress = ignore_progress) -> Toolchain:
    """Install a toolchain unless it is installed. Two concurrent installations are safe: the second waits for the
    first.

    Args:
        name: the toolchain's name.
        on_progress: called with what, done, total.

    Raises:
        ToolchainError: the name is unknown, there is no suitable Python or no disk space, or the packages could not be
            installed: then it gives pip's own reason, the log is kept, and nothing is left in place.
    """
    declared = declaration.read(name)
    with store.locked(name, on_progress) as lock:
        store.clear_staging(name)
        if (folder := store.installed(declared)) is not None:
            return store.toolchain_in(declared, folder)
        python, interpreter = _interpreter(declared)
        _check_space(declared)
        log = store.toolchains_folder() / f"{name}-install.log"
        log.unlink(missing_ok=True)
        place = store.environment_of(declared, python)
        building = store.staging(name)
        try:
            _Build(declared, building, log, lock).run(interpreter, on_progress)
            _try_out(declared, building, on_progress)
            shutil.rmtree(place, ignore_errors=True)  # an environment whose Python was taken away
            building.rename(place)
        except OSError as error:
            raise ToolchainError(f"could not be built: {error}", where=f"toolchain {name!r}") from error
        finally:
            shutil.rmtree(building, ignore_errors=True)
        log.unlink(missing_ok=True)
        return store.toolchain_in(declared, place)


def _interpreter(declared: Declaration) -> tuple[str, Path]:
    """Return a Python of one of the lock's versions: this one, one on the path, or one built by pyenv."""
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here in declared.python:
        return here, Path(sys.executable)
    for version in declared.python:
        for found in _candidates(version):
            if _answers(found, version):
                return version, found
    wanted = " or ".join(declared.python)
    raise ToolchainError(
        f"needs Python {wanted}, this is {here} and no other was found",
        where=f"toolchain {declared.name!r}",
        remedy=f"Install Python {wanted} (pyenv install {declared.python[0]}, or your system's package), so that "
        f"python{declared.python[0]} is on the PATH or below ~/.pyenv/versions",
    )


def _candidates(version: str) -> Iterator[Path]:
    """Yield files that may be this Python: in every folder on the path, then in pyenv's versions, newest first."""
    name = f"python{version}"
    for folder in os.get_exec_path():
        path = Path(folder) / name
        if path.is_file() and os.access(path, os.X_OK):
            yield path
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    built = [path for path in (root / "versions").glob(f"{version}.*/bin/{name}") if os.access(path, os.X_OK)]
    yield from sorted(built, key=lambda path: version_numbers(path.parent.parent.name), reverse=True)


def _answers(interpreter: Path, version: str) -> bool:
    """Return whether an interpreter has the version in its name: version managers put placeholders on the path."""
    ask = [str(interpreter), "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
    try:
        found = subprocess.run(ask, capture_output=True, text=True, timeout=_ASK_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return found.returncode == 0 and found.stdout.strip() == version


def _check_space(declared: Declaration) -> None:
    free = shutil.disk_usage(store.toolchains_folder()).free
    if free < declared.disk_bytes:
        raise ToolchainError(
            f"needs about {declared.disk_bytes >> 20} MiB of disk space, {free >> 20} MiB are free",
            where=str(store.toolchains_folder()),
            remedy="Make room, or set KEDGE_DATA to a folder on another disk",
        )


@dataclass(frozen=True)
class _Build:
    """The two steps that fill an environment; their output goes to the log.

    Attributes:
        lock: a descriptor that the steps inherit, so that the lock outlives this process for as long as they run.
    """

    declared: Declaration
    building: Path
    log: Path
    lock: int

    def run(self, interpreter: Path, report: OnProgress) -> None:
        """Create the environment and install the locked packages."""
        report("making the environment", 0, 0)
        if self.declared.architecture:
            foreign_system.make(self.declared, self.building, self._step)
        else:
            self._step([str(interpreter), "-m", "venv", str(self.building)])
        total = self.declared.packages + 1
        done = 0

        def heard(line: str) -> None:
            nonlocal done
            # Of an index, of a folder of wheels.
            if line.startswith(("Collecting ", "Processing ")):
                done += 1
                package = re.split("[=<>!~-]", Path(line.split()[1]).name)[0]
                report(f"fetching {package}", min(done, total), total)
            elif line.startswith("Installing collected"):
                report("unpacking", total, total)

        foreign = foreign_system.pip_options(self.building) if self.declared.architecture else []
        python = interpreter if foreign else self.building / "bin" / "python"
        command = [str(python), "-m", "pip", "install", "--require-hashes", "--no-deps", *foreign]
        command += ["--no-compile", "--no-input", "--disable-pip-version-check", "-r", str(self.declared.lock)]
        self._step(command, heard)

    def _step(self, command: list[str], heard: OnLine | None = None) -> None:
        """Run one step; raise :class:`ToolchainError` with the step's own reason if it fails."""
        env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        env |= {"PYTHONNOUSERSITE": "1", "PYTHONUNBUFFERED": "1"}
        with (
            self.log.open("a", encoding="utf-8") as out,
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=env,
                pass_fds=(self.lock,),
                start_new_session=True,
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    out.write(line)
                    if heard is not None:
                        heard(line)
            except BaseException:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode != 0:
            raise ToolchainError(
                f"could not be installed: {_reason(self.log)}",
                where=f"toolchain {self.declared.name!r}",
                remedy=f"The log is {self.log}",
            )


def _reason(log: Path) -> str:
    """Return the installer's own reason: its errors, or else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    errors = [line for line in errors if not line.startswith("Ignored the following")]
    return "; ".join(errors or lines[-1:] or ["no reason was given"])[:500]


def _try_out(declared: Declaration, building: Path, report: OnProgress) -> None:
    """Check that an environment can load its own packages before it is put in place. This also compiles what is loaded,
    whereas pip would compile everything."""
    report("trying it out", 0, 0)
    try:
        with store.toolchain_in(declared, building).worker() as worker:
            worker.call("version", {}, Versions, deadline=_TRY_SECONDS)
    except KedgeError as error:
        raise ToolchainError(
            f"was installed but does not work: {error}", where=f"toolchain {declared.name!r}"
        ) from error

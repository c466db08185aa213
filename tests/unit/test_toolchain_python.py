"""Finding a Python of another version: on the path, whatever stands before it there, and below pyenv."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kedge_protocol.errors import ToolchainError
from kedge_targets.toolchain import installation
from kedge_targets.toolchain.declaration import Declaration

VERSION = "3.5"
SHIM = '#!/bin/sh\necho "pyenv: python3.5: command not found" >&2\nexit 127\n'


@pytest.fixture
def declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Declaration:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PYENV_ROOT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return Declaration(name="tiny", folder=tmp_path, description="a test", python=(VERSION,), disk_bytes=1)


def program(path: Path, text: str = f"#!/bin/sh\necho {VERSION}\n", *, mode: int = 0o755) -> Path:
    """A program that says what it is told to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def found(declared: Declaration) -> tuple[str, Path]:
    return installation._interpreter(declared)


def test_this_python_where_it_fits(declared: Declaration) -> None:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    fits = Declaration(name="tiny", folder=declared.folder, description="", python=(VERSION, here), disk_bytes=1)
    assert found(fits) == (here, Path(sys.executable))


def test_a_placeholder_on_the_path_is_passed_over(
    declared: Declaration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "shims" / "python3.5", SHIM)
    program(tmp_path / "other" / "python3.5", "#!/bin/sh\necho 3.4\n")
    program(tmp_path / "locked" / "python3.5", mode=0o644)
    wanted = program(tmp_path / "real" / "python3.5")
    monkeypatch.setenv("PATH", ":".join(str(tmp_path / name) for name in ("shims", "other", "locked", "real")))
    assert found(declared) == (VERSION, wanted)


@pytest.mark.parametrize("own_root", [False, True])
def test_the_newest_that_pyenv_built(
    declared: Declaration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_root: bool
) -> None:
    root = tmp_path / "elsewhere" if own_root else tmp_path / "home" / ".pyenv"
    if own_root:
        monkeypatch.setenv("PYENV_ROOT", str(root))
    for patch in ("3.5.9", "3.5.10", "3.5.2", "3.6.15"):
        program(root / "versions" / patch / "bin" / "python3.5")
    program(root / "versions" / "3.5.11" / "bin" / "python3.5", SHIM)
    assert found(declared) == (VERSION, root / "versions" / "3.5.10" / "bin" / "python3.5")


def test_without_any_the_message_says_what_to_install(declared: Declaration, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "python3.5", SHIM)
    with pytest.raises(ToolchainError, match=r"needs Python 3\.5") as caught:
        found(declared)
    assert "pyenv install 3.5" in str(caught.value)
    assert "PATH" in str(caught.value)

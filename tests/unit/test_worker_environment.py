"""What every child is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from kedge_targets import registry
from kedge_targets.worker import environment

pytestmark = pytest.mark.device


def test_each_backend_declares_what_its_vendors_honour(tmp_path: Path) -> None:
    made = environment.of_child(tmp_path, tmp_path, None, None)
    for name in registry.names():
        package = __import__(f"kedge_targets.backends.{name}", fromlist=["environment"])
        assert package.environment.items() <= made.items()


def test_caches_and_temporary_files_go_to_the_scratch_folder(tmp_path: Path) -> None:
    made = environment.of_child(tmp_path, tmp_path, None, None)
    assert all(Path(made[name]).is_relative_to(tmp_path) for name in ("TMPDIR", "XDG_CACHE_HOME", "MPLCONFIGDIR"))


def test_the_callers_variables_win(tmp_path: Path) -> None:
    made = environment.of_child(tmp_path, tmp_path, None, {"DO_NOT_TRACK": "0", "MINE": "yes"})
    assert made["DO_NOT_TRACK"] == "0"
    assert made["MINE"] == "yes"


def test_another_interpreter_does_not_see_this_ones_packages(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert "PYTHONPATH" in environment.of_child(tmp_path, tmp_path, None, None)
    assert "PYTHONPATH" not in environment.of_child(tmp_path, tmp_path, tmp_path / "python", None)


def test_the_child_imports_nothing_heavy() -> None:
    code = "import sys, kedge_targets.worker.child; print(sorted({'numpy', 'onnx', 'torch'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"

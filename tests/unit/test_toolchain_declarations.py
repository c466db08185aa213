"""Each declared toolchain keeps the rules: locked with hashes, no registry named, a driver apart from Kedge."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from kedge_targets.toolchain import declaration, store
from kedge_targets.toolchain.store import data_folder

NAMES = declaration.names()


def test_there_is_one() -> None:
    assert NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_lock_has_hashes_and_exact_versions_only_and_names_no_registry(name: str) -> None:
    lock = declaration.read(name).lock.read_text(encoding="utf-8")
    entries = [entry for entry in re.split(r"\n(?=[A-Za-z0-9])", lock) if not entry.startswith("#")]
    assert len(entries) == declaration.read(name).packages > 0
    for entry in entries:
        assert re.match(r"[A-Za-z0-9._-]+==[^\s]+ \\\n", entry), entry[:80]
        assert "--hash=sha256:" in entry
    assert not re.search(r"://|--(extra-)?index-url|--find-links|@ ", lock)


@pytest.mark.parametrize("name", NAMES)
def test_the_driver_never_imports_kedge(name: str) -> None:
    tree = ast.parse(declaration.read(name).driver.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported
    assert not [module for module in imported if module.startswith("kedge")]


def test_what_all_drivers_share_imports_the_standard_library_alone() -> None:
    path = declaration.BACKENDS.parent / "toolchain/driver_side/driver_loop.py"
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.partition(".")[0] for module in imported} <= sys.stdlib_module_names
    for name in NAMES:
        assert "driver_loop.serve(" in declaration.read(name).driver.read_text(encoding="utf-8")


def test_the_key_is_of_lock_and_python() -> None:
    declared = declaration.read(NAMES[0])
    assert re.fullmatch(r"[0-9a-f]{16}", declared.key("3.11"))
    assert declared.key("3.11") != declared.key("3.12")


def test_where_the_users_data_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KEDGE_DATA", raising=False)
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert data_folder() == tmp_path / ".local" / "share" / "kedge"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert data_folder() == tmp_path / "xdg" / "kedge"
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "own"))
    assert data_folder() == tmp_path / "own"
    assert store.toolchains_folder() == tmp_path / "own" / "toolchains"

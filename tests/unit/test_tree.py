"""The form of the tree: short functions and files, no modules that import each other in a circle."""

from __future__ import annotations

from pathlib import Path

from tools import check_tree


def test_the_tree_keeps_its_form() -> None:
    assert not check_tree.violations()


def package(tree: Path, **files: str) -> Path:
    for folder in check_tree.PACKAGES:
        (tree / folder).mkdir(parents=True)
    for name, text in files.items():
        (tree / "host/kedge" / f"{name}.py").write_text(text)
    return tree


def test_a_circle_through_a_late_import_is_found(tmp_path: Path) -> None:
    tree = package(
        tmp_path,
        a="from kedge import b",
        b="def run():\n    from kedge.c import x",
        c="from . import a",
        d="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from kedge import e",
        e="import kedge.d",
    )
    assert check_tree.violations(tree) == ["modules that import each other: kedge.a, kedge.b, kedge.c"]


def test_what_is_too_long_is_named(tmp_path: Path) -> None:
    body = "    x = 1\n" * check_tree.FUNCTION_LINES
    tree = package(tmp_path, f=f"def long():\n{body}", g="\n" * (check_tree.FILE_LINES + 1))
    found = check_tree.violations(tree)
    assert len(found) == 2
    assert f"f.py:1: long has {check_tree.FUNCTION_LINES + 1} lines" in found[0]
    assert f"g.py: {check_tree.FILE_LINES + 1} lines" in found[1]


def test_a_conflict_left_in_a_document_is_found(tmp_path: Path) -> None:
    tree = package(tmp_path)
    (tree / "CHANGELOG.md").write_text("# Changes\n<<<<<<< HEAD\n- a\n=======\n- b\n>>>>>>> branch\n")
    (tree / "docs").mkdir()
    (tree / "docs" / "a.md").write_text("Title\n=======\n")
    found = check_tree.violations(tree)
    assert [line.rpartition("/")[2] for line in found] == [
        "CHANGELOG.md:2: a conflict is left: <<<<<<< HEAD",
        "CHANGELOG.md:6: a conflict is left: >>>>>>> branch",
    ]

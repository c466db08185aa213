"""Which files of the tree a device needs: the one rule by which both wheels are cut, so that no file is in both.

A device gets ``kedge_agent`` and ``kedge_protocol`` whole. Of ``kedge_targets`` it gets each backend's ``runtime.py``,
the worker, the devices' descriptions, and every module that any of these imports, however late. A task that is named
(``"package.module:function"``) counts as an import; an import for type checkers alone does not. All else is the host's.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

WHOLE = {"kedge_agent": "agent", "kedge_protocol": "protocol"}
TARGETS = "targets"
ROOTS = ("backends/*/runtime.py", "worker/**/*.py", "py.typed", "devices/**/*.toml")


def of_agent(tree: Path) -> dict[str, Path]:
    """Place in the wheel → file, sorted.

    Raises:
        ValueError: something that a device needs imports the host's package.
    """
    found = {path for package, folder in WHOLE.items() for path in files(tree / folder / package)}
    left = [*found, *(path for root in ROOTS for path in (tree / TARGETS / "kedge_targets").glob(root))]
    found |= set(left)
    while left:
        for path in _needed(tree, left.pop()):
            if path not in found:
                found.add(path)
                left.append(path)
    return _placed(tree, found)


def of_host(tree: Path) -> dict[str, Path]:
    """What is left: place in the wheel → file, sorted."""
    every = _placed(tree, {*files(tree / "host" / "kedge"), *files(tree / TARGETS / "kedge_targets")})
    boards = {f"kedge_targets/{path.relative_to(tree).as_posix()}": path for path in files(tree / "firmware-configs")}
    agents = of_agent(tree)
    return {place: path for place, path in sorted((every | boards).items()) if place not in agents}


def files(folder: Path) -> Iterator[Path]:
    """Every file below a folder; not what Python or an editor left there."""
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part == "__pycache__" or part.startswith(".") for part in parts)
        if path.is_file() and not hidden and path.suffix != ".pyc":
            yield path


def _placed(tree: Path, paths: set[Path]) -> dict[str, Path]:
    return {path.relative_to(tree).as_posix().partition("/")[2]: path for path in sorted(paths)}


def _needed(tree: Path, path: Path) -> Iterator[Path]:
    """The files of Kedge's own modules that a file imports, packages above them among them."""
    if path.suffix != ".py":
        return
    yield from (
        init for folder in path.parents if (init := folder / "__init__.py").is_file() and tree in folder.parents
    )
    for name in _imported(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] == "kedge":
            raise ValueError(f"{path.relative_to(tree)}: a device needs it, and it imports {name}")
        base = tree / WHOLE.get(parts[0], TARGETS)
        for count in range(1, len(parts) + 1):
            module = base.joinpath(*parts[:count])
            yield from (place for place in (module / "__init__.py", module.with_suffix(".py")) if place.is_file())


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("kedge_targets."):
            yield node.value.partition(":")[0]
        yield from _imported(node)

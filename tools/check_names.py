"""Refuse identifiers that contain a retired word (``retired_words.toml``): modules, classes, functions, variables."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import tomllib

PACKAGES = ("host/kedge", "agent/kedge_agent", "targets/kedge_targets", "protocol/kedge_protocol")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def retired(tree: Path) -> dict[str, str]:
    """Retired word → what to write instead."""
    words: dict[str, str] = tomllib.loads((tree / "tools" / "retired_words.toml").read_text("utf-8"))["words"]
    return words


def identifiers(source: str) -> Iterator[tuple[int, str]]:
    """``(line, name)`` of everything that a file names."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def problems(tree: Path) -> Iterator[str]:
    """One line for each identifier with a retired word."""
    words = retired(tree)
    for package in PACKAGES:
        for path in sorted((tree / package).rglob("*.py")):
            named = [(1, path.stem), *identifiers(path.read_text("utf-8"))]
            for line, name in named:
                for part in (one.lower() for one in _PARTS.findall(name)):
                    if part in words:
                        yield f"{path.relative_to(tree)}:{line}: {name}: {part!r} is retired, write {words[part]}"


def main() -> int:
    """Print the problems; the exit status is 1 if there are any."""
    found = sorted(set(problems(Path(__file__).parent.parent)))
    sys.stdout.writelines(f"{line}\n" for line in found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

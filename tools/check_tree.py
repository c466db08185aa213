"""What the four import packages promise of their form: ``make check`` and a unit test run it.

No function is longer than 60 lines, no file longer than 450, and no modules import each other in a circle. Imports
within functions count, those for type checkers alone do not. In no document a conflict of two branches is left.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
PACKAGES = ("host/kedge", "agent/kedge_agent", "targets/kedge_targets", "protocol/kedge_protocol")
FUNCTION_LINES = 60
FILE_LINES = 450


def modules(tree: Path = TREE) -> dict[str, Path]:
    """Dotted name → file of each module of the four packages."""
    found = {}
    for package in PACKAGES:
        root = tree / package
        for path in sorted(root.rglob("*.py")):
            parts = [root.name, *path.relative_to(root).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def long_places(path: Path) -> list[str]:
    """What is longer in a file than it may be."""
    text = path.read_text(encoding="utf-8")
    found = []
    if (lines := text.count("\n")) > FILE_LINES:
        found.append(f"{path}: {lines} lines, {FILE_LINES} are allowed")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                found.append(f"{path}:{node.lineno}: {node.name} has {lines} lines, {FUNCTION_LINES} are allowed")
    return found


def _imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from _imports(ast.Module([other], []))
        else:
            yield from _imports(child)


def imported(path: Path, name: str, known: set[str]) -> set[str]:
    """The known modules that a module imports, without itself. ``from package import name`` is an import of the
    module ``package.name`` where there is one, else of the package."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in _imports(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
        found |= {full if (full := f"{base}.{alias.name}") in known else base for alias in node.names}
    return (found & known) - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules of which each imports, directly or not, each other (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in order:
                visit(other)
                lowest[name] = min(lowest[name], lowest[other])
            elif other in stack:
                lowest[name] = min(lowest[name], order[other])
        if lowest[name] == order[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(graph):
        if name not in order:
            visit(name)
    return found


def unsettled(tree: Path) -> list[str]:
    """Return the places in documents where a conflict of two branches was left."""
    documents = [*tree.glob("*.md"), *tree.glob("docs/**/*.md")]
    return [
        f"{path}:{number}: a conflict is left: {line}"
        for path in sorted(documents)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if line.startswith(("<<<<<<< ", ">>>>>>> "))
    ]


def violations(tree: Path = TREE) -> list[str]:
    """A line for each broken promise."""
    found = modules(tree)
    graph = {name: imported(path, name, set(found)) for name, path in found.items()}
    return [
        *(line for path in found.values() for line in long_places(path)),
        *(f"modules that import each other: {', '.join(circle)}" for circle in circles(graph)),
        *unsettled(tree),
    ]


if __name__ == "__main__":
    sys.exit("\n".join(violations()) or 0)

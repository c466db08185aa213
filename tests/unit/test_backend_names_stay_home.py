"""No backend's name stands as a literal outside its own folder: generic code asks the registry."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tests.conftest import ROOT

from kedge_targets import registry

PACKAGES = ("host/kedge", "agent/kedge_agent", "targets/kedge_targets", "protocol/kedge_protocol")


def literals(source: str) -> list[tuple[int, str]]:
    """``(line, text)`` of each string of a module that is no documentation; parts of f-strings among them."""
    tree = ast.parse(source)
    documentation = {
        id(statement.value)
        for node in ast.walk(tree)
        if isinstance(body := getattr(node, "body", None), list)
        for statement in body
        if isinstance(statement, ast.Expr)
    }
    return [
        (node.lineno, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation
    ]


def named(text: str, names: set[str]) -> set[str]:
    """The names that stand in a text as words of their own: not within a longer name, not as a file's suffix."""
    return {word.rstrip(".") for word in re.findall(r"[\w.\-]+", text)} & names


def violations(path: Path, names: set[str]) -> list[str]:
    own = {name for name in names if (registry.BACKENDS / name) in path.parents}
    return [
        f"{path.relative_to(ROOT)}:{line}: {text!r}"
        for line, text in literals(path.read_text(encoding="utf-8"))
        if named(text, names - own)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_backend_is_named_outside_its_folder(package: str) -> None:
    names = set(registry.names())
    assert len(names) >= 3
    found = [line for path in sorted((ROOT / package).rglob("*.py")) for line in violations(path, names)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        'if backend == "tflite":\n    pass',
        'x = f"pip install kedge-agent[{1}] onnxruntime"',
        'x = {"openvino": 1}',
        'raise ValueError("install kedge-agent[tflite] first.")',
        'x = "kedge_targets/backends/openvino/compiler.py"',
    ],
)
def test_a_name_in_generic_code_is_found(source: str) -> None:
    names = {"tflite", "onnxruntime", "openvino"}
    assert any(named(text, names) for _, text in literals(source))


@pytest.mark.parametrize(
    "source",
    [
        '"""Works with onnxruntime."""',
        "import onnxruntime",
        "def f():\n    '''Asks openvino.'''\n    return 1",
        'suffix = "model.tflite"',
        'distribution = "tflite-runtime"',
    ],
)
def test_imports_documentation_suffixes_and_longer_names_are_none(source: str) -> None:
    names = {"tflite", "onnxruntime", "openvino"}
    assert not any(named(text, names) for _, text in literals(source))


def test_each_backend_may_name_itself_only() -> None:
    compiler = registry.BACKENDS / registry.names()[0] / "compiler.py"
    names = set(registry.names())
    assert not violations(compiler, names)
    assert violations(compiler, names - {registry.names()[0]}) == []

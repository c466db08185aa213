"""The names that users import are the ones that docs/stability.md promises, no more and no less."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from tests.conftest import ROOT

PUBLIC: dict[str, list[str]] = tomllib.loads((ROOT / "tools" / "site" / "public_api.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", PUBLIC)
def test_a_public_module_exports_what_is_promised(path: str) -> None:
    module = importlib.import_module(path)
    assert sorted(module.__all__) == PUBLIC[path], f"the changelog and {path} differ from tools/site/public_api.toml"
    assert module.__doc__
    for name in PUBLIC[path]:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"{path}.{name} has no docstring"


@pytest.mark.parametrize("path", PUBLIC)
def test_what_a_public_module_defines_is_promised_or_private(path: str) -> None:
    module = importlib.import_module(path)
    own = {
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == path and (inspect.isclass(value) or inspect.isfunction(value))
    }
    assert {name for name in own if not name.startswith("_")} <= set(PUBLIC[path])


def test_importing_the_packages_loads_neither_numpy_nor_a_runtime() -> None:
    """A controller's process and an application's start pay for what they use."""
    code = "import sys, kedge, kedge_agent; print({'numpy', 'onnx', 'torch', 'onnxruntime'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path("/"))
    assert done.stdout.strip() == "set()"


def test_the_stability_page_names_every_public_module() -> None:
    text = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    assert [path for path in PUBLIC if f"`{path}`" not in text] == []

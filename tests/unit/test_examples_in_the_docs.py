"""Examples in the documentation are true: Python compiles, Kedge reads the files, a step is a step."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import tomllib
from tests.support.documents import Block, blocks, pages

from kedge.fleet.staged import policy
from kedge.search import recipe
from kedge.simulator import scenario
from kedge.step import Step
from kedge_agent import config
from kedge_targets import target
from kedge_targets.pipeline import declaration

EXAMPLES = [block for page in pages() for block in blocks(page)]


def of(language: str) -> list[Block]:
    return [block for block in EXAMPLES if block.language == language]


def test_every_python_example_compiles() -> None:
    for block in of("python"):
        try:
            ast.parse(block.text)
        except SyntaxError as error:
            pytest.fail(f"{block.where}: {error}")


def test_every_toml_example_is_a_file_that_kedge_reads(tmp_path: Path) -> None:
    for block in of("toml"):
        data = tomllib.loads(block.text)
        file = tmp_path / "example.toml"
        file.write_text(block.text, encoding="utf-8")
        if "backends" in data:
            target.read(file)
            if block.title:  # an agent.toml of the same page names it
                file.rename(tmp_path / block.title)
        elif "device" in data and "broker" in data:
            config.read(file)
        elif "step" in data or "quantize" in data:
            recipe.read(file)
        elif "fleet" in data:
            scenario.read(file)
        elif "waves" in data:
            policy.read(file)
        elif "task" in data:
            declaration.read(file)
        else:
            assert "project" in data, f"{block.where}: nobody knows this kind of file"


def test_the_step_of_the_compression_page_is_a_step() -> None:
    (block,) = [block for block in of("python") if "class Polish" in block.text]
    names: dict[str, Any] = {"__name__": __name__}
    exec(compile(block.text, "compression.md", "exec", dont_inherit=True), names)
    assert issubclass(names["Polish"], Step)
    assert names["Polish"].Options().pattern == "bias"

"""TensorRT's recipe: written, read, and which line serves which version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_protocol.errors import ConfigError, StorageError
from kedge_targets.backends.tensorrt import recipe
from kedge_targets.backends.tensorrt.recipe import FP16, INT8, InputProfile, Recipe

RECIPE = Recipe(
    precisions=(INT8, FP16),
    files=dict(recipe.FILES),
    workspace_bytes=1 << 28,
    inputs=(InputProfile(name="image", minimum=(1, 3, 8, 8), optimum=(1, 3, 8, 8), maximum=(4, 3, 8, 8)),),
    outputs=("score",),
)


def test_what_is_written_is_read_again_and_equal_recipes_have_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "a.json", tmp_path / "b.json"
    recipe.write(RECIPE, first)
    recipe.write(replace(RECIPE, files=dict(reversed(recipe.FILES.items()))), second)
    assert recipe.read(first) == RECIPE
    assert first.read_bytes() == second.read_bytes()


def test_a_shape_is_static_where_all_three_are_equal() -> None:
    assert not RECIPE.static
    profile = InputProfile(name="image", minimum=(1, 8), optimum=(1, 8), maximum=(1, 8))
    assert replace(RECIPE, inputs=(profile,)).static


@pytest.mark.parametrize(
    ("version", "first"),
    [
        ("8.5.2.2", None),
        ("8.6.1", "8.6"),
        ("8.6.2.3", "8.6"),
        ("10.0.0b6", "10.0"),
        ("10.3.0.30", "10.0"),
        ("10.15.1.29", "10.0"),
        ("11.4.0.106", "11.0"),
        ("12.0.0", None),
    ],
)
def test_each_version_of_tensorrt_has_its_line(version: str, first: str | None) -> None:
    line = RECIPE.line(version)
    assert (line.first if line else None) == first


def test_flags_up_to_10_types_alone_from_11_on() -> None:
    old, middle, new = recipe.LINES
    for line in (old, middle):
        assert set(line.builder_flags[INT8]) == {"INT8", "FP16"}
        assert line.builder_flags[FP16] == ("FP16",)
    assert old.network_flags == ("EXPLICIT_BATCH",)
    assert new.network_flags == ("STRONGLY_TYPED",)
    assert not any(new.builder_flags.values())


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=4), st.lists(st.integers(0, 9999), min_size=1, max_size=4))
def test_versions_are_compared_as_numbers(left: list[int], right: list[int]) -> None:
    def padded(parts: list[int]) -> tuple[int, ...]:
        return tuple(parts + [0] * (4 - len(parts)))

    texts = [".".join(map(str, parts)) for parts in (left, right)]
    assert (recipe.numbers(texts[0]) < recipe.numbers(texts[1])) == (padded(left) < padded(right))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"form": 2}, "form 2"),
        ({"precisions": []}, "without their files"),
        ({"precisions": ["int8", "fp8"]}, "without their files"),
        ({"files": {"int8": "../elsewhere.onnx", "fp16": "b.onnx"}}, "does not lie beside it"),
        ({"workspace_bytes": "much"}, "much"),
        ({"outputs": None}, "outputs"),
        ({"inputs": [{"name": "image", "minimum": [1, 8], "optimum": [1], "maximum": [1, 8]}]}, "'image'"),
        ({"inputs": [{"name": "image", "minimum": [2], "optimum": [1], "maximum": [4]}]}, "'image'"),
        ({"inputs": [{"name": "image", "minimum": [0], "optimum": [1], "maximum": [4]}]}, "'image'"),
    ],
)
def test_a_broken_recipe_is_told(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    path = tmp_path / recipe.ENTRY
    recipe.write(RECIPE, path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=told):
        recipe.read(path)


def test_bytes_that_are_no_recipe(tmp_path: Path) -> None:
    path = tmp_path / recipe.ENTRY
    for content in (b"", b"\xff", b"[]", b"{}", b'"recipe"'):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"recipe\.json"):
            recipe.read(path)
    with pytest.raises(StorageError):
        recipe.read(tmp_path / "absent.json")

"""A mistyped name is answered with the one that was meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from kedge import steps
from kedge.compiler import arguments
from kedge.evaluation import metrics
from kedge.search import recipe_args
from kedge_protocol.errors import KedgeError
from kedge_protocol.spelling import known_names
from kedge_targets import registry, target


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        (lambda: target.find("rpi-4"), "rpi4"),
        (lambda: target.find("Generic_CPU"), "generic-cpu"),
        (lambda: steps.find("prune_channels"), "prune-channels"),
        (lambda: metrics.find("topp1", where="--metric"), "top1"),
        (lambda: registry.compiler("onnx-runtime"), "onnxruntime"),
        (lambda: recipe_args.parse_recipe(("prune-channels:ratoi=0.5",), None), "ratio"),
        (lambda: recipe_args.parse_recipe((), "precison=int8"), "precision"),
        (lambda: arguments.to_options({"effort": "quik"}), "quick"),
    ],
)
def test_the_name_that_was_meant_is_said(asked: Callable[[], object], meant: str) -> None:
    with pytest.raises(KedgeError, match=f"[Dd]id you mean {meant!r}\\?"):
        asked()


def test_a_key_of_a_file_too(tmp_path: Path) -> None:
    board = tmp_path / "board.toml"
    board.write_text((target.DEVICES / "rpi4.toml").read_text().replace("title", "tilte"))
    with pytest.raises(KedgeError, match=r"board.toml: tilte: unknown \(did you mean 'title'\?\)"):
        target.read(board)


def test_what_is_like_nothing_gets_the_list_alone() -> None:
    assert known_names("zzz", ["rpi4", "ncs2"]) == "Known are rpi4, ncs2"
    assert known_names("zzz", []) == "Known are none"

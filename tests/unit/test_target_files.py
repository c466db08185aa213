"""Target files: what is wrong with one is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import ROOT

from kedge_protocol.errors import TargetError
from kedge_targets import registry, target

pytestmark = pytest.mark.device

BOARD = """
name = "my-board"
title = "My own board"

[processor]
architecture = "aarch64"
instruction_sets = ["neon"]
cores = 4

[system]
os = "Linux"
memory_bytes = 1_000_000_000

[[backends]]
name = "onnxruntime"
options = { threads = 2 }

[runtimes]
onnxruntime = "1.20"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "board.toml"
    path.write_text(text)
    return path


def test_a_board_of_ones_own(tmp_path: Path) -> None:
    board = target.find(str(written(tmp_path, BOARD)))
    assert board.name == "my-board"
    assert board.processor.instruction_sets == ("neon",)
    assert board.backends[0].options == {"threads": 2}
    assert board.runtimes == {"onnxruntime": "1.20"}


def test_the_first_backend_is_a_usual_one(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="first one that is not usual"):
        target.read(written(tmp_path, BOARD.replace("options = { threads = 2 }", "usual = false")))


def test_the_example_of_the_documentation_is_a_target(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    example = text.split("```toml", 1)[1].split("```", 1)[0]
    board = target.read(written(tmp_path, example))
    assert {choice.name for choice in board.backends} <= set(registry.names())


@pytest.mark.parametrize("name", target.names())
def test_each_target_of_kedge_is_read_and_named_as_its_file(name: str) -> None:
    found = target.find(name)
    assert found.name == name
    assert found.title
    assert found.processor.architecture in ("x86_64", "aarch64", "armv7l")
    for choice in found.backends:
        distributions = registry.runtime(choice.name).distributions
        assert set(found.runtimes) & set(distributions), "the file does not say which runtime the device has"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('name = "my-board"', "", "name"),
        ('name = "my-board"', 'name = "My Board!"', "My Board!"),
        ("cores = 4", 'cores = "four"', "four"),
        ("cores = 4", "cores = 4\nsockets = 1", "sockets"),
        ("memory_bytes = 1_000_000_000", "", "memory_bytes"),
        ('instruction_sets = ["neon"]', 'instruction_sets = ["neon", 7]', "7"),
        ("[[backends]]", "[backend]", "backend"),
        ("[processor]", "[processor", "not TOML"),
        ('onnxruntime = "1.20"', "onnxruntime = 1.20", "1.2"),
    ],
)
def test_a_broken_file_is_told_with_its_name_the_fault_and_where_to_look(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    assert old in BOARD
    with pytest.raises(TargetError) as caught:
        target.find(str(written(tmp_path, BOARD.replace(old, new, 1))))
    text = str(caught.value)
    assert "board.toml" in text
    assert told in text
    assert "docs/targets.md" in text


def test_a_file_without_a_backend(tmp_path: Path) -> None:
    text = BOARD[: BOARD.index("[[backends]]")].replace("title", "backends = []\ntitle", 1)
    with pytest.raises(TargetError, match="lists no backend"):
        target.find(str(written(tmp_path, text)))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"absent\.toml: cannot be read: No such file"):
        target.find(str(tmp_path / "absent.toml"))


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match=r"board\.toml"):
        target.find(str(path))


def test_an_unknown_name_lists_those_there_are_and_how_to_give_a_file() -> None:
    with pytest.raises(TargetError) as caught:
        target.find("rpi5000")
    text = str(caught.value)
    assert all(name in text for name in target.names())
    assert ".toml" in text

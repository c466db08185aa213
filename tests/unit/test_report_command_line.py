"""The command line's door: quick, lazy, clear where something is missing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import click
import pytest
from click.testing import CliRunner

from kedge.cli.main import COMMANDS, main
from kedge.compiler import validation
from kedge.options import Option, command_line, made
from kedge_protocol.errors import MissingDependencyError

WITHOUT = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from kedge.cli.main import main
main({arguments!r})
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)


def test_help_lists_every_command_and_imports_none() -> None:
    done = python(
        "import sys\nfrom kedge.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([n for n in ('numpy', 'onnx', 'rich', 'sqlalchemy', 'kedge.compiler') if n in sys.modules])"
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    assert [name for name in COMMANDS if f"  {name} " not in done.stdout] == []


def test_import_of_kedge_loads_nothing_heavy() -> None:
    done = python("import sys, kedge\nprint([n for n in ('numpy', 'onnx', 'click') if n in sys.modules], dir(kedge))")
    assert done.stdout.startswith("[] ")
    assert "'compile'" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_each_command_is_where_the_group_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([name, "--help"])
    assert exit_.value.code == 0
    assert f"Usage: kedge {name}" in capsys.readouterr().out


def test_without_the_compile_extra_compile_says_how_to_get_it(tmp_path: Path) -> None:
    arguments = ["compile", "m.onnx", "--name", "m", "--version", "1", "--target", "rpi4"]
    arguments += ["--calibration", "c.npz", "--evaluation", "e.npz", "-o", str(tmp_path / "OUT")]
    hidden = {"onnx", "jinja2", "rich"}
    done = python(WITHOUT.format(hidden=hidden, arguments=arguments))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        'error: compiling needs onnx, jinja2, rich. Install it: pip install "kedge-host[compile]"'
    )


def test_a_python_too_old_to_compile_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13, "final", 0))
    with pytest.raises(MissingDependencyError, match=r"needs Python 3\.11 or newer, this is 3\.10"):
        validation.check_environment()


def test_targets_are_listed_with_their_backends(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["target", "list"])
    said = capsys.readouterr().out
    for text in ("generic-cpu", "rpi4", "intel-cpu", "aarch64", "tflite"):
        assert text in said


@pytest.mark.parametrize(
    ("arguments", "meant"), [(["rolout"], "rollout"), (["rollout", "statu"], "status"), (["step", "lst"], "list")]
)
def test_an_unknown_command_is_a_usage_error(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert f"No such command '{arguments[-1]}'. Did you mean '{meant}'?" in capsys.readouterr().err


@pytest.mark.parametrize("group", ["", "controller", "device", "keys", "release", "rollout", "samples", "shadow"])
def test_the_help_of_a_group_cuts_no_sentence_off(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*group.split(), "--help"])
    commands = capsys.readouterr().out.partition("Commands:")[2]
    assert commands
    assert "..." not in commands


def test_a_layout_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(tmp_path)])
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: is not an OCI image layout")
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["inspect", str(tmp_path / "OUT")])
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'OUT'}: there is no such folder. Give the folder")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    many: Annotated[tuple[str, ...], Option("Several.", flag="--one")]
    path: Annotated[Path, Option("A path.", short="-p")]
    number: Annotated[float, Option("A number.")] = 0.5
    count: Annotated[int | None, Option("Perhaps a count.")] = None
    loud: Annotated[bool, Option("A flag.")] = False
    hidden: int = 3


def test_options_are_derived_from_a_dataclass() -> None:
    seen: list[Example] = []

    @click.command()
    @click.argument("other")
    @command_line(Example)
    def command(other: str, **values: object) -> None:
        seen.append(made(Example, {"other": other, **values}))

    arguments = ["x", "--one", "a", "--one", "b", "-p", "q", "--number", "2", "--count", "7", "--loud"]
    assert CliRunner().invoke(command, arguments).exit_code == 0
    assert CliRunner().invoke(command, ["x", "--one", "a", "--path", "q"]).exit_code == 0
    assert seen == [
        Example(many=("a", "b"), path=Path("q"), number=2.0, count=7, loud=True),
        Example(many=("a",), path=Path("q")),
    ]
    assert CliRunner().invoke(command, ["x", "--path", "q"]).exit_code == 2
    shown = CliRunner().invoke(command, ["--help"]).output
    assert "--hidden" not in shown
    assert "[default: 0.5]" in shown

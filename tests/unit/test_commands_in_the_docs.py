"""Every command of Kedge that the documentation names exists, with the options that it is given there."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from tests.conftest import ROOT
from tests.support.documents import blocks, commands, pages, simple_commands

from kedge.cli.main import cli as kedge
from kedge_agent.cli import cli as agent

PROGRAMS: dict[str, click.Group] = {"kedge": kedge, "kedge-agent": agent}
_INLINE = re.compile(r"(?<!`)`(kedge(?:-agent)? [^`\n]+)`(?!`)")


def checked(words: list[str]) -> None:
    """Parse one command line against the tree of commands.

    Raises:
        click.UsageError: there is no such command or option, an option lacks its value, or a complete line lacks
            what the command needs. A line with ``…`` is not complete; a group alone stands for its commands.
    """
    program, *arguments = words
    complete = not {"…", "...", "[…]"} & set(arguments)
    command: click.Command = PROGRAMS[program]
    context = click.Context(command, info_name=program)
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith(("-", "…")):
        name = arguments.pop(0)
        found = command.get_command(context, name)
        if found is None:
            raise click.UsageError(f"no such command: {name}")
        context = click.Context(found, parent=context, info_name=name)
        command = found
    if isinstance(command, click.Group) or not complete:
        command.make_parser(context).parse_args(list(arguments))
        return
    try:
        command.make_context(command.name, list(arguments), parent=context.parent)
    except click.exceptions.Exit:  # --help, --version
        return


def of_kedge(words: list[str]) -> list[str]:
    """The words from Kedge's program on, also where ``sudo`` or ``docker`` starts it; none of another's command."""
    if words[0] == "sudo":
        words = re.sub(r"^sudo( -[ug] \S+)*", "sudo", " ".join(words)).split()
    place = next((at for at, word in enumerate(words) if Path(word).name in PROGRAMS), None)
    if place is None or (place > 0 and words[0] not in ("sudo", "docker")):
        return []
    return [Path(words[place]).name, *words[place + 1 :]]


def test_each_command_line_of_a_page_is_one_that_kedge_takes() -> None:
    problems = []
    for command in [command for page in pages() for block in blocks(page) for command in commands(block)]:
        for words in simple_commands(command.text):
            if found := of_kedge(words):
                try:
                    checked(found)
                except click.UsageError as error:
                    problems.append(f"{command.where}: {command.text}: {error.format_message()}")
    assert not problems, "\n".join(problems)


def test_each_command_in_the_text_of_a_page_exists() -> None:
    problems = []
    for page in pages():
        for text in _INLINE.findall(page.read_text(encoding="utf-8")):
            for words in simple_commands(text):
                # A sentence names what it speaks of; what the command needs beside that is not said each time.
                try:
                    if found := of_kedge(words):
                        checked([*found, "…"])
                except click.UsageError as error:
                    problems.append(f"{page.relative_to(ROOT)}: `{text}`: {error.format_message()}")
    assert not problems, "\n".join(problems)


def test_a_program_that_another_starts_is_found() -> None:
    words = ["sudo", "-u", "kedge", "/opt/kedge/bin/kedge-agent", "status"]
    assert of_kedge(words) == ["kedge-agent", "status"]
    assert of_kedge(["docker", "compose", "exec", "controller", "kedge", "publish", "OUT"]) == [
        "kedge",
        "publish",
        "OUT",
    ]
    assert of_kedge(["cd", "kedge"]) == []


def test_an_incomplete_line_is_held_by_its_options_alone() -> None:
    checked(["kedge", "compile", "m.onnx", "…", "--effort", "high"])
    with pytest.raises(click.UsageError, match="--efort"):
        checked(["kedge", "compile", "m.onnx", "…", "--efort", "high"])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "kedge compile m.onnx --name a --version 1 --target rpi4 --calibration c --evaluation e -o O --max-dorp 1",
            "max-dorp",
        ),
        ("kedge compile m.onnx --name a", "Missing option"),
        ("kedge rollout begin digits:1.0", "begin"),
        ("kedge rollout status --wait", "requires an argument"),
        ("kedge-agent run --confg a", "confg"),
        ("kedge publish", "Missing argument"),
    ],
)
def test_a_line_that_kedge_does_not_take_is_found(line: str, said: str) -> None:
    with pytest.raises(click.UsageError) as caught:
        checked(line.split())
    assert said in caught.value.format_message()

"""The tutorials are scripts: what a page tells to type is typed, and what it shows comes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT
from tests.support.documents import Command, blocks, commands
from tests.support.ports import free_port

TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
_PORT = re.compile(r"127\.0\.0\.1:(\d+)")


class Tutorial:
    """One page: its titled blocks are files, its blocks of a shell are one session of bash.

    Args:
        page: to read. Ports of the loopback interface become free ones.
    """

    def __init__(self, page: Path) -> None:
        self._ports: dict[str, int] = {}
        told = [block for block in blocks(page) if not block.remark.startswith("not run")]
        self.files = {block.title: self._with_free_ports(block.text) for block in told if block.title}
        self.commands = [command for block in told if not block.title for command in commands(block)]

    def _with_free_ports(self, text: str) -> str:
        return _PORT.sub(lambda port: f"127.0.0.1:{self._ports.setdefault(port[1], free_port())}", text)

    def run(self, folder: Path, log: Path) -> list[str]:
        """Type it all.

        Args:
            folder: where the reader is; empty.
            log: a folder for what each command prints.

        Returns:
            What each command printed. The test fails at the first one whose exit status is not 0.
        """
        for name, text in self.files.items():
            (folder / name).write_text(text + "\n", encoding="utf-8")
        script = []
        for number, command in enumerate(self.commands):
            text = self._with_free_ports(command.text)
            script.append(f"{{ {text}\n}} > {log}/{number} 2>&1 || {{ echo {number} > {log}/failed; exit 1; }}")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        session = subprocess.Popen(
            ["bash", "-c", "\n".join(script)],
            cwd=folder,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            session.wait(1000)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(session.pid, signal.SIGKILL)
        if (log / "failed").exists():
            number = int((log / "failed").read_text())
            logs = "".join(f"\n--- {one.name}\n{one.read_text()[-2000:]}" for one in sorted(folder.glob("*.log")))
            pytest.fail(f"{self.commands[number].text}\n{(log / str(number)).read_text()}{logs}")
        return [(log / str(number)).read_text(encoding="utf-8") for number in range(len(self.commands))]


def missing(command: Command, printed: str) -> list[str]:
    """The lines below a command that it did not print, in their order; ``…`` stands for any text."""
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    place, left = 0, []
    for shown in command.output:
        if shown.strip() == "…":
            continue
        pattern = re.compile(".*".join(re.escape(part) for part in " ".join(shown.split()).split("…")))
        found = next((at for at in range(place, len(lines)) if pattern.fullmatch(lines[at])), None)
        if found is None:
            left.append(shown)
        else:
            place = found + 1
    return left


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_a_tutorial_does_what_it_says(page: Path, tmp_path: Path) -> None:
    tutorial = Tutorial(page)
    folder, log = tmp_path / "home", tmp_path / "log"
    folder.mkdir()
    log.mkdir()
    printed = tutorial.run(folder, log)
    for command, text in zip(tutorial.commands, printed, strict=True):
        assert not missing(command, text), f"{command.where}: {command.text}\nprinted:\n{text}"


def test_output_that_a_command_did_not_print_is_missed() -> None:
    command = Command("page.md:1", "kedge rollout status", ("rollout 1: … (start, done)", "…", "kitchen done …"))
    assert not missing(command, "rollout 1: digits:1.0 (start, done)\n1 device\nkitchen   done  abc\n")
    assert missing(command, "rollout 1: digits:1.0 (start, pending)\nkitchen done abc\n") == [command.output[0]]
    assert missing(command, "kitchen done abc\nrollout 1: digits:1.0 (start, done)\n") == ["kitchen done …"]

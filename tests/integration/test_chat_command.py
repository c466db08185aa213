"""``kedge-agent chat`` as a person uses it: in a terminal, through a pipe, with a folder or an installed model."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support import decoders
from tests.support.installed import install
from tests.support.waiting import wait_for

from kedge_agent import Model
from kedge_agent.generation.chat_command import talk

IN_FOREGROUND = """
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a command in the terminal that is its standard input, where what is typed becomes signals. A shell's background
job, as this test may be, ignores SIGINT and hands that down."""
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that never ends by itself."""
    sizes = {"max_position_embeddings": 4000, "eos_token_id": None}
    return decoders.writer(tmp_path_factory.mktemp("chat"), slots=1, template=TEMPLATE, changed=sizes)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose answers take so long that none ends before it is stopped, however busy the machine is."""
    sizes = {"max_position_embeddings": 60_000, "eos_token_id": None}
    place = tmp_path_factory.mktemp("endless")
    return decoders.writer(place, slots=1, context=60_000, template=TEMPLATE, changed=sizes)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kedge_agent.cli", "chat", *arguments]


def piped(said: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), input=said, capture_output=True, text=True, timeout=300, check=False)


def test_answers_go_to_standard_output_and_all_else_to_standard_error(release: Path, tmp_path: Path) -> None:
    said = "hello\n\n/new\nhello\n" + "a" * 5000 + "\nhello\n"
    done = piped(said, str(release), "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first == second != third  # a new conversation; the third goes on
    assert done.stderr.count("[8 tokens, ") == 3
    assert "the context 4000" in done.stderr
    assert "/new begins a new conversation" in done.stderr
    install(tmp_path / "state", release)
    installed = piped("hello\n", "writer", "--state", str(tmp_path / "state"), "--max-tokens", "8")
    assert installed.stdout.splitlines() == [first]
    other = piped("hello\n", str(release), "--max-tokens", "8", "--system", "Be brief.")
    assert other.stdout.splitlines() != [first]


def test_what_is_no_language_model_is_one_line(tmp_path: Path) -> None:
    done = piped("", "nothing", "--state", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'nothing' is no release folder, no model that is installed and no reference")
    assert len(done.stderr.splitlines()) == 1


def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends(endless: Path) -> None:
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    start = [sys.executable, "-c", IN_FOREGROUND, *command(str(endless), "--max-tokens", "50000")]
    process = subprocess.Popen(start, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = bytearray()

    def shown(text: str, after: int = 0) -> bool:
        try:
            seen.extend(os.read(ours, 65536))
        except BlockingIOError:
            pass
        except OSError:  # the other end is closed
            return text.encode() in seen[after:]
        return text.encode() in seen[after:]

    try:
        wait_for(lambda: shown("> "), what="the prompt")
        assert b"Ctrl-D ends" in seen
        os.write(ours, b"hello\n")
        asked = len(seen) + len("hello\r\n")
        wait_for(lambda: shown("") and len(seen) > asked + 20, what=lambda: f"an answer after {bytes(seen[-200:])!r}")
        os.write(ours, b"\x03")
        wait_for(lambda: shown("cancelled]", asked), what=lambda: f"the end of the answer after {bytes(seen[-200:])!r}")
        wait_for(lambda: shown("> ", seen.index(b"cancelled]")), what=lambda: f"a prompt after {bytes(seen[-200:])!r}")
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
        assert b"Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_just_as_an_answer_ends_leaves_the_conversation(release: Path) -> None:
    notes: list[str] = []

    def note(text: str) -> None:
        notes.append(text)
        if len(notes) == 1:
            raise KeyboardInterrupt

    written: list[str] = []
    with Model(release, target="generic-cpu") as model:
        talk(model, ["hello", "hello"], written.append, note, {"max_tokens": 4})
    assert [text[:10] for text in notes] == ["[4 tokens,", "[cancelled", "[4 tokens,"]
    assert "".join(written).count("\n") == 2

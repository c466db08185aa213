"""What the command line ``kedge-agent`` says when something ends it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kedge_agent import cli, status

pytestmark = pytest.mark.device


def ended(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["kedge-agent", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    return exit_.value.code


def test_ctrl_c_is_one_line_and_status_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Path) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(status, "read_status", interrupted)
    assert ended(monkeypatch, "status", "--state", str(tmp_path)) == 130
    assert capsys.readouterr().err.split() == ["error:", "interrupted"]


def test_an_error_is_one_line_and_a_wrong_option_tells_the_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(monkeypatch, "status", "--state", str(tmp_path / "none")) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'none'}: there is no state folder")
    assert said.count("\n") == 1
    assert ended(monkeypatch, "status", "--stat", str(tmp_path)) == 2
    assert "Usage: kedge-agent status" in capsys.readouterr().err
    assert ended(monkeypatch, "--version") == 0

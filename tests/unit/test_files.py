"""Files are whole or not there; locks are between processes; addresses, credentials and user folders have one rule."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kedge_protocol import addresses, credentials, files, folders, toml
from kedge_protocol.errors import ConfigError, TargetError


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write(path, b"old", mode=0o640)
    with pytest.raises(ZeroDivisionError), files.new_file(path) as file:
        file.write(b"new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_file_written_once_stays_the_first(tmp_path: Path) -> None:
    path = tmp_path / "key"
    files.write_once(path, b"first", mode=0o600)
    with pytest.raises(FileExistsError):
        files.write_once(path, b"second")
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def test_a_lock_is_held_by_one_and_ends_with_its_block(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    other = files.open_lock(path)
    try:
        with files.locked(path):
            assert not files.try_lock(other)
            assert not files.try_lock(other, shared=True)
        assert files.try_lock(other)
    finally:
        os.close(other)


def test_a_lock_file_is_never_a_link(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError), files.locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_port_zero_is_an_address_only_where_it_is_asked_for() -> None:
    assert addresses.parse("localhost:0", any_port=True) == ("localhost", 0)
    for text in ("::1:80", "[::1:80", "[127.0.0.1]:80", "a:00000000080000"):
        with pytest.raises(ConfigError, match="listen"):
            addresses.parse(text, where="listen")


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("host", False)],
)
def test_loopback_is_told_from_the_rest(host: str, inside: bool) -> None:
    assert addresses.is_loopback(host) is inside


def test_a_password_is_the_first_line_and_no_large_file(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes("pä\nx".encode())
    assert credentials.read_password(path) == "pä"
    for content, words in ((b"", "empty"), (b"\nx", "empty"), (b"\xff", "UTF-8"), (b"x" * (2 << 20), "no credential")):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            credentials.read_password(path)


def test_a_relative_base_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "here")
    assert folders.user_folder("XDG_STATE_HOME", ".local/state") == tmp_path / ".local/state/kedge"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"x = [", "not TOML"), (b"\xff", "not TOML"), (b"x = " + b"[" * 9999, "not TOML")],
)
def test_toml_that_cannot_be_read_is_the_error_of_its_kind(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TargetError, match=words):
        toml.read(path, TargetError)

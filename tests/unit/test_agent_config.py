"""agent.toml: what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from kedge_agent.config import read
from kedge_protocol.errors import ConfigError, InputError
from kedge_targets import target as targets

pytestmark = pytest.mark.device

ROOT = Path(__file__).resolve().parents[2]
LEAST = '[device]\nname = "d1"\ntarget = "rpi4"\n[broker]\nurl = "mqtt://127.0.0.1"\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "agent.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_least_that_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEDGE_STATE", str(tmp_path / "elsewhere"))
    config = read(written(tmp_path, LEAST))
    assert (config.name, config.target, config.broker.port) == ("d1", "rpi4", 1883)
    assert config.state == tmp_path / "elsewhere"
    assert config.listen == "127.0.0.1:8080"
    assert config.update.window == 16
    assert config.distributions == tuple(sorted(targets.find("rpi4").runtimes))


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\nmore\n")
    more = 'username = "u"\npassword_file = "secret"\n[state]\npath = "st"\n[serve]\nenabled = false\n'
    config = read(written(tmp_path, LEAST + more))
    assert config.state == tmp_path / "st"
    assert config.broker.password == "hunter2"
    assert "hunter2" not in repr(config)
    assert config.listen is None


def test_a_board_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text((targets.DEVICES / "rpi4.toml").read_text().replace('"rpi4"', '"mine"'))
    config = read(written(tmp_path, LEAST.replace('"rpi4"', '"board.toml"')))
    assert config.target == "mine"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "device"),
        ("x = [", "not TOML"),
        (LEAST + '[serve]\nlissten = "x"\n', "lissten"),
        (LEAST + "[colour]\n", "colour"),
        (LEAST + '[limits]\nwindow = "16"\n', "window"),
        (LEAST + "[limits]\nwindow = 0\n", "window of 0"),
        (LEAST + "[limits]\nprove_mib = -1\n", "negative"),
        (LEAST + "[telemetry]\ninterval = 0.01\n", "telemetry.interval"),
        (LEAST + '[serve]\nlisten = "8080"\n', "serve.listen"),
        (LEAST + '[serve]\nlisten = "h:99999"\n', "serve.listen"),
        (LEAST + '[serve]\nlisten = "0.0.0.0:8080"\n', "asked for nothing"),
        (LEAST + '[serve]\ngrpc = "0.0.0.0:8081"\n', "asked for nothing"),
        (LEAST + '[serve]\nlisten = "0.0.0.0:8080"\ntoken_file = "absent"\n', "token file cannot be read"),
        (LEAST + "[serve]\ncall_seconds = 0\n", "call_seconds"),
        (LEAST + "[serve]\nbody_mib = 0\n", "body_mib"),
        (LEAST + '[serve]\nlisten = "0.0.0.0:8080"\ntls_client_ca = "ca.pem"\n', "there is no TLS"),
        (LEAST.replace('"d1"', '"a/b"'), "device name"),
        (LEAST.replace("mqtt://127.0.0.1", "http://x"), "broker's address"),
        (LEAST + 'username = "u"\npassword = "p"\npassword_file = "f"\n', "both given"),
        (LEAST + 'username = "u"\npassword_file = "absent"\n', "cannot be read"),
        (LEAST.replace('"rpi4"', '"./absent.toml"'), "absent.toml"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        read(written(tmp_path, text))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml"):
        read(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("path", sorted(ROOT.glob("firmware-configs/*/agent.toml")), ids=lambda path: path.parent.name)
def test_the_configurations_for_boards_are_good(tmp_path: Path, path: Path) -> None:
    lines = path.read_text().splitlines()
    (tmp_path / "password").write_text("secret\n")
    # Its certificate authority is the user's own.
    kept = [line for line in lines if not line.startswith("ca =")]
    assert read(written(tmp_path, "\n".join(kept))).name


def test_inputs_go_to_larger_models_only_where_the_device_says_so(tmp_path: Path) -> None:
    assert not read(written(tmp_path, LEAST)).server.cascade
    assert read(written(tmp_path, LEAST + "[serve]\ncascade = true\n")).server.cascade


def test_what_a_device_allows_its_clients_reaches_the_server(tmp_path: Path) -> None:
    server = read(written(tmp_path, LEAST + '[serve]\nbody_mib = 100\nallowed_hosts = ["edge.example"]\n')).server
    assert (server.max_body_bytes, server.allowed_hosts) == (100 << 20, ("edge.example",))

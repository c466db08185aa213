"""``kedge-agent serve`` and ``infer``: a release over HTTP, or on the command line, with no fleet at all."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.support.bundles import CLASSES, make_bundle, samples
from tests.support.installed import install
from tests.support.standalone import serving

from kedge_agent import Model
from kedge_agent.infer_command import infer
from kedge_agent.serving.registry_client import parse_reference
from kedge_protocol.errors import InputError

pytestmark = pytest.mark.device


def agent(*arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kedge_agent.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, input=text)


BODY = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 16], "data": samples(1).ravel().tolist()}]}


def test_a_release_folder_is_served_loaded_and_unloaded_and_survives_its_process(tmp_path: Path) -> None:
    release = make_bundle(tmp_path, version="1.5")
    expected = Model(release, target="generic-cpu")(samples(1))
    with serving(str(release), "--listen", "127.0.0.1:0") as server:
        assert server.lines[0].startswith("tiny 1.5 for generic-cpu")
        server.wait()
        status, answer = server.ask("POST", "/v2/models/tiny/versions/1.5/infer", BODY)
        assert status == 200
        np.testing.assert_array_equal(np.float32(answer["outputs"][0]["data"]), expected.ravel())
        assert server.ask("POST", "/v2/repository/models/tiny/unload", {})[0] == 200
        assert server.ask("GET", "/v2/models/tiny/ready")[0] == 503
        (row,) = server.ask("POST", "/v2/repository/index", {})[1]
        assert (row["state"], row["reason"]) == ("UNAVAILABLE", "unloaded")
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        assert server.ask("POST", "/v2/repository/models/tiny/load", {})[0] == 200
        assert server.ask("POST", "/v2/models/tiny/infer", BODY)[0] == 200
        # Killed, it is started anew; who connects meanwhile waits and is not refused.
        os.kill(server.child, signal.SIGKILL)
        assert server.ask("GET", "/v2/health/live")[0] == 200
        server.wait("/v2/models/tiny/ready")
        assert server.ask("POST", "/v2/models/tiny/infer", BODY)[0] == 200


def test_what_is_installed_is_served_by_its_name(tmp_path: Path) -> None:
    install(tmp_path / "state", make_bundle(tmp_path, "other"))
    path = tmp_path / "kedge.sock"
    with (
        serving("other", "--state", str(tmp_path / "state"), "--listen", f"unix:{path}"),
        socket.socket(socket.AF_UNIX) as link,
    ):
        link.connect(str(path))
        link.sendall(b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert link.recv(4096).startswith(b"HTTP/1.1 200 OK")
    assert not path.exists()


def test_what_cannot_be_served_is_one_line(tmp_path: Path) -> None:
    release = str(make_bundle(tmp_path, target=("generic-cpu", "rpi4")))
    (tmp_path / "no.pem").write_text("no certificate")
    pem = str(tmp_path / "no.pem")
    for arguments, words in (
        (("nothing",), "no release folder, no model that is installed"),
        ((release,), "Name one with --target: generic-cpu, rpi4"),
        ((release, "--target", "jetson"), "It has: generic-cpu"),
        ((release, "--target", "generic-cpu", "--listen", "0.0.0.0:0"), "clients are asked for nothing"),
        ((release, "--target", "generic-cpu", "--listen", "nowhere"), "not an address"),
        ((release, release, "--target", "generic-cpu"), "two sources"),
        ((release, "--target", "generic-cpu", "--tls-cert", pem), "no certificate can be read"),
        ((release, "--target", "generic-cpu", "--listen", "0.0.0.0:0", "--tls-client-ca", pem), "there is no TLS"),
        (("127.0.0.1:9/none:1",), "cannot be reached"),
    ):
        done = agent("serve", *arguments)
        assert done.returncode == 1
        assert words in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1


def test_infer_reads_an_array_and_prints_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = make_bundle(tmp_path)
    expected = Model(release, target="generic-cpu")(samples(2))
    np.save(tmp_path / "x.npy", samples(2))
    done = agent("infer", str(release), "--target", "generic-cpu", "--input", str(tmp_path / "x.npy"))
    np.testing.assert_array_equal(np.float32(json.loads(done.stdout)["scores"]), expected)
    done = agent(
        "infer", str(release), "--target", "generic-cpu", "--input", "input=-", text=json.dumps(samples(1).tolist())
    )
    assert np.shape(json.loads(done.stdout)["scores"]) == (1, CLASSES)
    np.save(tmp_path / "large.npy", np.full((1, 16), 3.4e38, np.float32))
    (tmp_path / "photo.jpg").write_bytes(b"a picture")
    for given, words in (
        (("none.npy",), "none.npy: there is no such file"),
        # The file's name was taken for a text, and so for a sample.
        (("photo.jpg",), "photo.jpg: is no array, and no pipeline of the model takes it"),
        (("large.npy",), "output 'scores': holds NaN or infinity, which JSON cannot say. Give --output"),
        (("x.npy", "x.npy"), "given twice"),
        (("input=-", "other=-"), "given twice"),
    ):
        inputs = [one if "=" in one else str(tmp_path / one) for one in given]
        with pytest.raises(InputError, match=re.escape(words)):
            infer(str(release), inputs)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"input": 1}')))
    with pytest.raises(InputError, match="Give a list of numbers"):
        infer(str(release), ["-"])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("ghcr.io/kedge/digits:1.0", ("ghcr.io", "kedge/digits", "1.0")),
        ("oci://localhost:5000/digits", ("localhost:5000", "digits", "latest")),
        ("localhost/a/b@sha256:" + "0" * 64, ("localhost", "a/b", "sha256:" + "0" * 64)),
        ("digits", None),
        ("folder/digits", None),
        ("host:5000/UPPER", None),
    ],
)
def test_references_of_registries(text: str, found: tuple[str, str, str] | None) -> None:
    reference = parse_reference(text)
    assert (reference and (reference.host, reference.name, reference.version)) == found

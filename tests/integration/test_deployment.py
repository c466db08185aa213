"""The controller's container, as far as it goes without a container daemon: its steps, its broker, its check."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from tests.conftest import ROOT
from tests.support.documents import blocks
from tests.support.ports import free_port
from tests.support.waiting import wait_for

from kedge.cli.main import cli
from kedge.fleet import health
from kedge_protocol.errors import FleetError

DEPLOY = ROOT / "deploy"
DOCKERFILE = DEPLOY / "controller" / "Dockerfile"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, in order."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def of(word: str) -> list[str]:
    return [rest for name, rest in instructions() if name == word]


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    return found


def parses(arguments: list[str]) -> None:
    """A command line of ``kedge``; raises where it takes no such thing."""
    command, context = cli, click.Context(cli, info_name="kedge")
    while isinstance(command, click.Group):
        found = command.get_command(context, arguments[0])
        assert found is not None, arguments
        command, arguments = found, arguments[1:]
    command.make_context(command.name, list(arguments))


def test_the_image_runs_kedge_as_a_user_without_rights_and_checks_it() -> None:
    assert of("USER")[-1] == "$UID"
    assert of("ARG") == ["UID=10001"]
    assert json.loads(of("ENTRYPOINT")[-1]) == ["kedge"]
    parses(json.loads(of("CMD")[-1]))
    program, *arguments = json.loads(of("HEALTHCHECK")[-1].partition("CMD ")[2])
    assert program == "kedge"
    parses(arguments)


def test_what_the_image_copies_is_there_and_reaches_the_daemon() -> None:
    sources = [rest.split()[0] for rest in of("COPY") if not rest.startswith("--from")]
    let_in = (DOCKERFILE.parent / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert all((ROOT / source).is_dir() and f"!{source}" in let_in for source in sources)


def test_the_compose_file_opens_nothing_without_tls() -> None:
    services = compose()["services"]
    assert services["broker"]["ports"] == ["8883:8883"]
    assert "ports" not in services["controller"]
    parses(services["controller"]["command"])
    settings = (DEPLOY / "mosquitto" / "mosquitto.conf").read_text(encoding="utf-8").splitlines()
    assert [line for line in settings if line.startswith("listener")] == ["listener 8883"]
    assert "allow_anonymous false" in settings
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (DEPLOY / source).is_dir() or source.startswith("./secrets/")


def test_the_broker_s_access_rules_are_those_of_the_fleet_s_page() -> None:
    (told,) = (block.text for block in blocks(ROOT / "docs" / "fleet.md") if block.text.startswith("# devices: what"))
    assert (DEPLOY / "mosquitto" / "acl").read_text(encoding="utf-8").strip() == told.strip()


def test_without_a_controller_the_check_says_so(tmp_path: Path) -> None:
    with pytest.raises(FleetError, match="no controller has been connected yet"):
        health.check(tmp_path)
    mark = health.Mark(tmp_path)
    mark.update(connected=False)
    with pytest.raises(FleetError, match="no controller"):
        health.check(tmp_path)
    mark.update(connected=True)
    assert health.check(tmp_path).age_seconds < health.MAX_AGE_SECONDS
    os.utime(tmp_path / "controller.alive", (0, 0))
    with pytest.raises(FleetError, match=r"has not been connected for \d+ s"):
        health.check(tmp_path)


def controlled(folder: Path, kedge: list[str]) -> None:
    """Prepare, start mosquitto and a controller as the compose file does, and wait until the health check holds.

    Args:
        folder: where a copy of ``deploy/`` goes.
        kedge: the command.
    """
    shutil.copytree(DEPLOY, folder / "deploy")
    deploy, state, port = folder / "deploy", folder / "state", free_port()
    subprocess.run([deploy / "prepare.sh", "broker.example"], check=True, capture_output=True)
    settings = (deploy / "mosquitto" / "mosquitto.conf").read_text(encoding="utf-8")
    settings = settings.replace("/mosquitto/secrets", str(deploy / "secrets" / "broker"))
    settings = settings.replace("/mosquitto/config", str(deploy / "mosquitto")).replace("8883", f"{port} 127.0.0.1")
    (folder / "mosquitto.conf").write_text(settings + "user root\n", encoding="utf-8")
    arguments = [
        argument.replace("broker:8883", f"localhost:{port}").replace("/run/kedge", str(deploy / "secrets/controller"))
        for argument in compose()["services"]["controller"]["command"]
    ]
    program = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
    running: list[subprocess.Popen[bytes]] = []
    with (folder / "log").open("wb") as log:
        try:
            running.append(subprocess.Popen([program, "-c", folder / "mosquitto.conf"], stdout=log, stderr=log))
            wait_for(lambda: _listens(port), what="mosquitto")
            environment = {**os.environ, "KEDGE_FLEET_STATE": str(state)}
            running.append(subprocess.Popen([*kedge, *arguments], stdout=log, stderr=log, env=environment))
            wait_for(
                lambda: (state / "controller.alive").exists() or running[1].poll() is not None,
                what=f"a connected controller (see {folder / 'log'})",
            )
            check = json.loads(of("HEALTHCHECK")[-1].partition("CMD ")[2])
            done = subprocess.run([*kedge, *check[1:]], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr + (folder / "log").read_text()
        finally:
            for process in reversed(running):
                process.terminate()
                process.wait(60)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.needs("mosquitto", "openssl", "mosquitto_passwd")
def test_the_compose_file_s_controller_reaches_its_broker_and_is_healthy(tmp_path: Path) -> None:
    controlled(tmp_path, [sys.executable, "-m", "kedge.cli.main"])


@pytest.mark.campaign
@pytest.mark.needs("mosquitto", "openssl", "mosquitto_passwd")
def test_the_dockerfile_s_steps_give_a_controller_in_a_clean_place(tmp_path: Path) -> None:
    source, root = tmp_path / "source", tmp_path / "root"
    source.mkdir()
    root.mkdir()
    for rest in of("COPY"):
        if not rest.startswith("--from"):
            shutil.copytree(
                ROOT / rest.split()[0], source / rest.split()[1], ignore=shutil.ignore_patterns("__pycache__")
            )
    build = of("RUN")[0].replace("/opt/kedge", str(root / "kedge"))
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "KEDGE_ROOT")}
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
    subprocess.run(["sh", "-c", build], cwd=source, env=environment, check=True)
    shutil.rmtree(source)
    listed = subprocess.run(
        [root / "kedge/bin/pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    ).stdout
    assert not {"torch", "onnx", "openvino"} & {line.partition("==")[0] for line in listed.splitlines()}
    controlled(tmp_path, shlex.split(f"env -u PYTHONPATH -u KEDGE_ROOT {root}/kedge/bin/kedge"))

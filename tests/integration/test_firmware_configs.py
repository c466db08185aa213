"""What a board is made ready with: units that systemd accepts, configurations that the agent reads."""

from __future__ import annotations

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kedge_agent import config

ROOT = Path(__file__).resolve().parents[2] / "firmware-configs"
BOARDS = sorted(path.name for path in ROOT.iterdir() if path.is_dir())
INSTALLED = "/opt/kedge/bin/kedge-agent"


def _service(board: str) -> dict[str, str]:
    _, _, section = (ROOT / board / "kedge-agent.service").read_text().partition("[Service]\n")
    lines = section.partition("[Install]")[0].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def _authority() -> bytes:
    """A certificate authority of its own, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    start = datetime.datetime(2026, 1, 1)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=9000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def test_both_boards_are_there() -> None:
    assert BOARDS == ["linux-x86", "raspberry-pi"]


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("board", BOARDS)
def test_systemd_accepts_the_unit(board: str, tmp_path: Path) -> None:
    agent = Path(sys.executable).with_name("kedge-agent")
    assert agent.exists()
    text = (ROOT / board / "kedge-agent.service").read_text()
    assert text.count(INSTALLED) == 1
    unit = tmp_path / "kedge-agent.service"
    # systemd looks whether the program exists.
    unit.write_text(text.replace(INSTALLED, str(agent)))
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kedge-agent.service" not in done.stderr


@pytest.mark.needs("systemd-analyze")
@pytest.mark.parametrize("board", BOARDS)
def test_the_unit_is_hardened(board: str) -> None:
    """systemd's own judgement: 0 is shut, 10 is open; a service as it comes has 9.6."""
    path = ROOT / board / "kedge-agent.service"
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("board", BOARDS)
def test_the_unit_restarts_watches_and_limits(board: str) -> None:
    service = _service(board)
    assert service["Type"] == "notify"
    assert service["Restart"] == "always"
    assert int(service["WatchdogSec"]) > 0
    assert service["StateDirectory"] == "kedge"
    assert service["OOMPolicy"] == "continue"
    assert "MemoryMax" in service
    assert service["ExecStart"].startswith(f"{INSTALLED} run --config /etc/kedge/agent.toml")


@pytest.mark.parametrize("board", BOARDS)
def test_the_agent_reads_the_configuration(board: str, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_bytes((ROOT / board / "agent.toml").read_bytes())
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "ca.pem").write_bytes(_authority())
    found = config.read(tmp_path / "agent.toml")
    assert found.state == Path("/var/lib/kedge")
    assert found.listen == "127.0.0.1:8080"
    assert found.target in {"rpi4", "intel-cpu"}
    assert found.distributions
    assert found.broker.password == "secret"


@pytest.mark.parametrize("board", BOARDS)
def test_the_steps_name_what_the_unit_uses(board: str) -> None:
    steps = (ROOT / board / "README.md").read_text()
    service = _service(board)
    assert f"python3 -m venv {Path(INSTALLED).parents[1]}" in steps
    assert f"nologin {service['User']}" in steps
    assert "/etc/kedge" in steps

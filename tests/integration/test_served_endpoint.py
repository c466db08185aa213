"""Golden samples through the served endpoint: HTTP to a real serving process, or the model as applications load it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_serving_survives import Supervised
from tests.support.bundles import make_bundle
from tests.support.installed import install

from kedge_agent import counters
from kedge_agent.served_endpoint import Endpoint, knock
from kedge_agent.serving.settings import ServerSettings
from kedge_agent.slots import ModelFolder
from kedge_protocol.errors import ConfigError, EndpointError, VerificationError

pytestmark = pytest.mark.device

Installed = Callable[..., tuple[ModelFolder, str]]


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    def make(**options: Any) -> tuple[ModelFolder, str]:
        folder = install(tmp_path / "state", make_bundle(tmp_path, "tiny", **options))
        slot = folder.current()
        assert slot is not None
        return folder, slot.digest

    return make


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Callable[..., Endpoint]]:
    started: list[Supervised] = []

    def start(settings: ServerSettings = ServerSettings(), **options: Any) -> Endpoint:  # noqa: B008 -- frozen
        server = Supervised(tmp_path / "state", settings=settings)
        started.append(server)
        server.wait(lambda: server.supervisor.said("tiny") is not None)
        return Endpoint(
            address=f"0.0.0.0:{server.port}",
            token_file=settings.token_file,
            certificate=settings.tls_cert,
            **options,
        )

    yield start
    for one in started:
        one.stop()


def test_golden_samples_hold_through_http_and_count_nowhere(
    installed: Installed, serving: Callable[..., Endpoint]
) -> None:
    folder, digest = installed()
    endpoint = serving()
    samples = folder.current().bundle().config.golden.samples  # type: ignore[union-attr]
    assert knock(folder, digest, endpoint=endpoint) == samples > 0
    assert counters.collect(folder.counters) == counters.Totals(digests={digest: 0})


@pytest.mark.parametrize("options", [{"batch": 4}, {"double": True}])
def test_models_of_any_form_are_asked(
    installed: Installed, serving: Callable[..., Endpoint], options: dict[str, Any]
) -> None:
    folder, digest = installed(**options)
    assert knock(folder, digest, endpoint=serving()) > 0


@pytest.mark.parametrize("http", [True, False])
@pytest.mark.parametrize("broken", ["weights", "golden"])
def test_wrong_answers_are_told_from_an_endpoint_that_does_not_answer(
    installed: Installed, serving: Callable[..., Endpoint], broken: str, http: bool
) -> None:
    folder, digest = installed(broken=broken)
    with pytest.raises(VerificationError, match="golden vectors do not hold"):
        knock(folder, digest, endpoint=serving() if http else None)


def test_without_http_the_model_is_asked_as_applications_load_it(installed: Installed) -> None:
    folder, digest = installed()
    assert knock(folder, digest) > 0
    assert counters.collect(folder.counters).inferences == 0


def test_another_bundle_or_nobody_behind_the_endpoint_is_an_error(
    installed: Installed, serving: Callable[..., Endpoint]
) -> None:
    folder, old = installed(version="1.0")
    endpoint = serving()
    with pytest.raises(EndpointError, match="another bundle is current"):
        knock(folder, "sha256:" + "0" * 64, endpoint=endpoint)
    assert knock(folder, old, endpoint=endpoint) > 0
    with pytest.raises(EndpointError, match="does not answer"):
        knock(folder, old, endpoint=Endpoint(address="127.0.0.1:1"))


def test_the_endpoint_wants_its_token(tmp_path: Path, installed: Installed, serving: Callable[..., Endpoint]) -> None:
    folder, digest = installed()
    token = tmp_path / "token"
    token.write_text("secret\n", encoding="utf-8")
    token.chmod(0o600)
    endpoint = serving(ServerSettings(token_file=str(token)))
    assert knock(folder, digest, endpoint=endpoint) > 0
    with pytest.raises(EndpointError, match="401"):
        knock(folder, digest, endpoint=Endpoint(address=endpoint.address))
    token.unlink()
    with pytest.raises(ConfigError):
        knock(folder, digest, endpoint=endpoint)


def test_the_endpoint_speaks_tls_and_only_its_own_certificate_is_trusted(
    tmp_path: Path, installed: Installed, serving: Callable[..., Endpoint]
) -> None:
    def made(name: str) -> str:
        cert = tmp_path / f"{name}.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-keyout", str(cert.with_suffix(".key")), "-out", str(cert), "-days", "2", "-subj", "/CN=elsewhere"]
        subprocess.run(command, check=True, capture_output=True)
        return str(cert)

    folder, digest = installed()
    cert = made("own")
    endpoint = serving(ServerSettings(tls_cert=cert, tls_key=cert.replace(".pem", ".key")))
    assert knock(folder, digest, endpoint=endpoint) > 0
    with pytest.raises(EndpointError, match="does not answer"):
        knock(folder, digest, endpoint=Endpoint(address=endpoint.address, certificate=made("other")))

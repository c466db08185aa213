"""The controller's page on a free port of loopback, and a plain client that may send any header."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from kedge.fleet.service import FleetService
from kedge.page.options import PageOptions
from kedge.page.server import serving
from tests.support.bundles import make_bundle


class Page:
    """A page that is being served.

    Args:
        url: of its root.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.netloc = self.url.partition("//")[2]

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers (names in lower case) and body of an answer; redirections are not followed."""
        raw = None if body is None else body if isinstance(body, (bytes, str)) else json.dumps(body)
        connection = http.client.HTTPConnection(self.netloc, timeout=60)
        try:
            sent = {"Content-Type": "application/json"} if raw is not None else {}
            connection.request(method, path, raw, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None, status: int = 200) -> Any:
        """Return an answer's JSON; the status must be this one."""
        found, _, raw = self.ask(method, f"/api/v1{path}", body)
        assert found == status, (found, raw)
        return json.loads(raw) if raw else None


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two releases for two targets; the second has a compile report."""
    folder = tmp_path_factory.mktemp("layouts")
    both = ["rpi4", "generic-cpu"]
    found = {
        "1.0": make_bundle(folder, version="1.0", target=both),
        "2.0": make_bundle(folder, version="2.0", target=both, head_seed=1),
    }
    (found["2.0"] / "report.html").write_text("<title>made</title><script>alert(1)</script>", encoding="utf-8")
    return found


@pytest.fixture
def fleet(tmp_path: Path, releases: dict[str, Path]) -> Iterator[FleetService]:
    """A fleet of two devices with both releases."""
    with FleetService(tmp_path / "state") as made:
        for layout in releases.values():
            made.publish(layout)
        made.device_add("pi", "rpi4", {"site": "berlin"})
        made.device_add("pc", "generic-cpu")
        yield made


@pytest.fixture
def page(fleet: FleetService) -> Iterator[Page]:
    """Its page, without a controller."""
    address = PageOptions(page="127.0.0.1:0").parsed()
    assert address is not None
    with serving(fleet.state, address) as url:
        yield Page(url)

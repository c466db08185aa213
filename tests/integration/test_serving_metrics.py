"""``/metrics``, read by Prometheus itself."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.test_serving_over_http import Child, tensor
from tests.support import requirements
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install

pytestmark = pytest.mark.device


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Child]:
    install(tmp_path / "state", make_bundle(tmp_path))
    child = Child(tmp_path / "state")
    yield child
    child.stop()


def value(port: int, query: str) -> float | None:
    """What Prometheus answers to a query; None before it has a sample."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            found = json.load(answer)["data"]["result"]
    except (urllib.error.URLError, ConnectionError):
        return None
    return float(found[0]["value"][1]) if found else None


def test_prometheus_reads_the_metrics(tmp_path: Path, child: Child) -> None:
    program = requirements.program("prometheus")
    for _ in range(3):
        assert child.ask("/v2/models/tiny/infer", tensor(samples(2)))[0] == 200
    assert child.ask("/v2/models/tiny/infer", {"inputs": []})[0] == 400
    with urllib.request.urlopen(f"http://127.0.0.1:{child.port}/metrics", timeout=10) as answer:
        text = answer.read()
    checked = subprocess.run(
        [requirements.program("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=60
    )
    assert checked.returncode == 0, checked.stderr.decode()
    config = tmp_path / "prometheus.yml"
    target = f"127.0.0.1:{child.port}"
    config.write_text(
        f"scrape_configs: [{{job_name: kedge, scrape_interval: 300ms, scrape_timeout: 300ms, "
        f'static_configs: [{{targets: ["{target}"]}}]}}]\n'
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while (up := value(port, "up")) != 1:
            assert time.monotonic() < end, up
            time.sleep(0.1)
        assert value(port, 'kedge_requests_total{model="tiny",outcome="ok"}') == 3
        assert value(port, 'kedge_requests_total{model="tiny",outcome="error"}') == 1
        assert value(port, "kedge_samples_total") == 6
        assert value(port, "kedge_request_seconds_count") == 3
        assert value(port, 'histogram_quantile(0.9, kedge_request_seconds_bucket{model="tiny"})') is not None
    finally:
        process.terminate()
        process.wait(30)

"""``/metrics``, read by Prometheus itself."""

from __future__ import annotations

import json
import subprocess
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
from tests.support.ports import free_port
from tests.support.waiting import wait_for

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
        with urllib.request.urlopen(url, timeout=60) as answer:
            found = json.load(answer)["data"]["result"]
    except (urllib.error.URLError, ConnectionError):
        return None
    return float(found[0]["value"][1]) if found else None


def test_prometheus_reads_the_metrics(tmp_path: Path, child: Child) -> None:
    program = requirements.program("prometheus")
    for _ in range(3):
        assert child.ask("/v2/models/tiny/infer", tensor(samples(2)))[0] == 200
    assert child.ask("/v2/models/tiny/infer", {"inputs": []})[0] == 400
    with urllib.request.urlopen(f"http://127.0.0.1:{child.port}/metrics", timeout=60) as answer:
        text = answer.read()
    checked = subprocess.run(
        [requirements.program("promtool"), "check", "metrics"], input=text, capture_output=True, timeout=300
    )
    assert checked.returncode == 0, checked.stderr.decode()
    config = tmp_path / "prometheus.yml"
    target = f"127.0.0.1:{child.port}"
    config.write_text(
        f"scrape_configs: [{{job_name: kedge, scrape_interval: 1s, scrape_timeout: 1s, "
        f'static_configs: [{{targets: ["{target}"]}}]}}]\n'
    )
    port = free_port()
    command = [program, f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL)
    try:
        expected = {
            'kedge_requests_total{model="tiny",outcome="ok"}': 3,
            'kedge_requests_total{model="tiny",outcome="error"}': 1,
            "kedge_samples_total": 6,
            "kedge_request_seconds_count": 3,
            'histogram_quantile(0.9, kedge_request_seconds_bucket{model="tiny"}) > bool 0': 1,
        }
        for query, number in expected.items():  # each by itself: a scrape that comes late on a busy machine empties all
            wait_for(lambda query=query, number=number: value(port, query) == number, what=query)
    finally:
        process.terminate()
        process.wait(60)

"""Clients that people have at hand: curl, Node's fetch, aiohttp."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from tests.integration.test_serving_over_http import Child, tensor
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install

BODY = json.dumps(tensor(samples(1)))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("clients")
    install(folder / "state", make_bundle(folder))
    child = Child(folder / "state")
    yield f"http://localhost:{child.port}/v2"
    child.stop()


@pytest.mark.skipif(shutil.which("curl") is None, reason="apt-get install curl")
@pytest.mark.parametrize("options", [[], ["-H", "Transfer-Encoding: chunked"], ["-H", "Expect: 100-continue"], ["-0"]])
def test_curl(url: str, options: list[str]) -> None:
    done = subprocess.run(
        ["curl", "-sS", "-4", *options, "-d", BODY, f"{url}/models/tiny/infer"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["model_name"] == "tiny"


@pytest.mark.skipif(shutil.which("node") is None, reason="apt-get install nodejs")
def test_fifty_fetches_of_node_at_once(url: str) -> None:
    script = f"""
    const url = "{url.replace("localhost", "127.0.0.1")}/models/tiny/infer"
    const ask = () => fetch(url, {{method: "POST", body: {BODY!r}}})
      .then(answer => answer.status)
    Promise.all(Array.from({{length: 50}}, ask)).then(all => console.log(all.join(" ")))
    """
    done = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.split() == ["200"] * 50


def test_aiohttp_goes_on_after_a_head(url: str) -> None:
    aiohttp = pytest.importorskip("aiohttp", reason="pip install --no-deps -r constraints/proofs.txt")

    async def ask() -> list[int]:
        connector = aiohttp.TCPConnector(limit=1, family=2)
        async with aiohttp.ClientSession(connector=connector) as session:
            found = []
            for path in ("/models/tiny", "/models/none", "/health/ready"):
                async with session.head(url + path) as head:
                    found.append(head.status)
                async with session.post(f"{url}/models/tiny/infer", data=BODY) as answer:
                    found.append(answer.status)
                    await answer.json()
            return found

    assert asyncio.run(ask()) == [200, 200, 404, 200, 200, 200]

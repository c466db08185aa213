"""stories260K over two agents of a fleet: mutual TLS between them, one killed while the other writes."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.integration.test_generation_of_stories import SHARED
from tests.support.agents import AgentProcess
from tests.support.authority import Authority
from tests.support.brokers import wait_for
from tests.support.controllers import ControllerProcess
from tests.support.ports import free_port

import kedge
from kedge.compiler.decoders.splitting import part_name
from kedge.fleet.keys import Keys
from kedge.fleet.service import FleetService
from kedge_agent import Model
from kedge_protocol import codec

pytestmark = pytest.mark.shared_data

NAME, PROMPT, COUNT = "stories", "Once upon a time", 200


class Site:
    """A fleet of two devices: the first writes, through the second.

    Args:
        model: what is compiled in two parts, and as a whole beside them.
        options: for :func:`kedge.compile`.
    """

    def __init__(self, folder: Path, stack: ExitStack, model: Path, name: str, **options: Any) -> None:
        self.name = name
        for out, split in (("whole", None), ("parts", 2)):
            kedge.compile(
                model, name=name, version="1.0", targets=["generic-cpu"], out=folder / out, split=split, slots=4,
                max_perplexity="9x", **options,
            )  # fmt: skip
        self.whole = folder / "whole"
        self.fleet = stack.enter_context(FleetService(folder / "state"))
        self.link = f"127.0.0.1:{free_port()}"
        port = free_port()
        keys = folder / "trust.json"
        keys.write_bytes(codec.encode(Keys(self.fleet.state).trust()))
        keys.chmod(0o600)
        controller = ControllerProcess(self.fleet.state, "--embedded", "--listen", f"127.0.0.1:{port}")
        stack.enter_context(controller).start()
        authority, self.agents = Authority(folder), []
        for at, lines in enumerate((f'[split.next]\n{name} = "{self.link}"\n', f'listen = "{self.link}"\n')):
            device = f"device-{at}"
            cert, key = authority.certificate(device)
            split = f'[split]\nca = "{authority.ca}"\ncert = "{cert}"\nkey = "{key}"\nseconds = 5.0\n{lines}'
            self.fleet.device_add(device, "generic-cpu", {"part": str(at)})
            url, trust = f"mqtt://127.0.0.1:{port}", '[trust]\nfile = "trust.json"\n'
            self.agents.append(stack.enter_context(AgentProcess(folder, url, name=device, more=trust + split)).start())
        # The later part first: then the first one finds it.
        for at in (1, 0):
            self.fleet.publish(folder / "parts" / f"part-{at + 1}")
            self.fleet.rollout_start(f"{part_name(name, at)}:1.0", {"part": str(at)})
            status = self.fleet.rollout_status(wait=90)
            assert status.done, status

    def ask(self, count: int, *, stream: bool = True) -> Any:
        """Ask the first device for a completion."""
        body = {"model": self.name, "prompt": PROMPT, "max_tokens": count, "temperature": 0, "stream": stream}
        url = f"http://127.0.0.1:{self.agents[0].port}/v1/completions"
        return urllib.request.urlopen(url, json.dumps(body).encode(), timeout=30)

    def stream(self, count: int) -> Iterator[str]:
        """Yield pieces of an answer of the first device, then a JSON text if it ends with an error."""
        with self.ask(count) as answer:
            for line in answer:
                event = line.decode().strip().removeprefix("data: ")
                if event and event != "[DONE]":
                    found = json.loads(event)
                    yield found["error"]["message"] if "error" in found else found["choices"][0]["text"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not there: {SHARED}")
    folder = tmp_path_factory.mktemp("site")
    (folder / "texts.txt").write_text("Once upon a time, there was a little girl. " * 60)
    data = {"calibration": folder / "texts.txt", "evaluation": folder / "texts.txt"}
    with ExitStack() as stack:
        yield Site(folder, stack, SHARED, NAME, quantize="precision=int8,method=plain", **data)


def test_two_hundred_tokens_over_two_agents_are_those_of_one(site: Site) -> None:
    with Model(site.whole, target="generic-cpu") as whole:
        expected = whole.generate(PROMPT, max_tokens=COUNT)
    assert len(expected.tokens) == COUNT
    assert "".join(site.stream(COUNT)) == expected.text
    models = site.agents[1].ask("/v1/models")
    assert models is not None
    assert models["data"] == []  # what holds layers only is not offered


def test_an_agent_that_is_killed_in_the_middle_is_a_clear_error_and_heals(site: Site) -> None:
    pieces = site.stream(400)
    begun = [next(pieces) for _ in range(5)]
    site.agents[1].kill()
    killed = time.monotonic()
    *_, last = pieces
    assert time.monotonic() - killed < 10
    assert f"{site.link}: the link is lost" in last
    asked = time.monotonic()
    with pytest.raises(urllib.error.HTTPError) as refused:
        site.ask(5, stream=False)
    assert refused.value.code == 503
    assert time.monotonic() - asked < 10
    site.agents[1].start()
    with Model(site.whole, target="generic-cpu") as whole:
        expected = whole.generate(PROMPT, max_tokens=COUNT)

    wait_for(lambda: "".join(site.stream(COUNT)) == expected.text, 60, "an answer by both agents")
    assert expected.text.startswith("".join(begun))

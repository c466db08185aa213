"""A language model is updated on a device whose memory has no room for two versions: the old one ends its answers and
makes way, the new one is proved and serves; what is damaged or too large leaves the old one where it was."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import decoders
from tests.support.field import Device, Field

from kedge.demo.processes import command_of, wait_until
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.bundle.write import new_layout

MIB = 1 << 20
LIMIT, NEEDED = 1400, 800
"""MiB that the agent and its children may take, and that a version declares: one fits beside an agent and its serving
process, two do not."""
TOKENS = 180
"""A part of a second."""
CLIENTS = 3


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version → release; 3.0 has damaged weights, 4.0 needs all the memory, 5.0 more than there is."""
    place = tmp_path_factory.mktemp("memory")
    source = Layout(decoders.writer(place, slots=2))
    damaged = bytearray(source.blob_path(source.bundle("generic-cpu").files["decoder.bin"].digest).read_bytes())
    damaged[2:4000:4] = bytes(len(damaged[2:4000:4]))
    (place / "damaged.bin").write_bytes(damaged)
    needs = {"1.0": NEEDED, "2.0": NEEDED, "3.0": NEEDED, "4.0": LIMIT - 5, "5.0": LIMIT + 1}
    weights = {"3.0": {"decoder.bin": place / "damaged.bin"}}
    return {v: _again(source, place / f"as-{v}", v, mib, weights.get(v, {})) for v, mib in needs.items()}


def _again(source: Layout, path: Path, version: str, mib: int, files: dict[str, Path]) -> Path:
    """Write a release's bundle once more, as another version that declares so much memory."""
    bundle = source.bundle("generic-cpu")
    there = {title: source.blob_path(layer.digest) for title, layer in bundle.files.items()} | files
    golden = there.pop(bundle.config.golden.file)
    resources = replace(bundle.config.resources, memory_bytes=mib * MIB)
    with new_layout(path) as layout:
        layout.add_bundle(replace(bundle.config, version=version, resources=resources), there, golden)
        layout.add_release("writer", version)
    return path


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Field]:
    with Field(tmp_path) as field:
        yield field


def _ask(device: Device, tokens: int) -> tuple[int, str]:
    """Status and text of a completion."""
    status, answer = _completion(device, tokens)
    return status, answer["choices"][0]["text"] if status == 200 else answer["error"]["message"]


def _completion(device: Device, tokens: int) -> tuple[int, dict[str, Any]]:
    body = {"model": "writer", "prompt": "Once upon a time", "max_tokens": tokens, "temperature": 0}
    request = urllib.request.Request(f"{device.endpoint}/v1/completions", json.dumps(body).encode())
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as refused:
        return refused.code, json.loads(refused.read())


def _serves(device: Device, releases: dict[str, Path], version: str) -> bool:
    status, answer = _completion(device, 2)
    digest = Layout(releases[version]).bundle("generic-cpu").digest
    return status == 200 and answer["system_fingerprint"] == f"fp_{digest[7:19]}"


def test_where_two_versions_do_not_fit_the_old_one_makes_way_and_comes_back_if_the_new_one_fails(
    fleet: Field, releases: dict[str, Path]
) -> None:
    device = fleet.add("one", "generic-cpu", command_of("kedge-agent"), memory_mib=LIMIT)
    for release in releases.values():
        fleet.publish(release)
    fleet.start_rollout("writer:1.0")
    assert fleet.decided() == {"one": "done"}, fleet.reasons()
    wait_until("version 1.0", lambda: _serves(device, releases, "1.0"), seconds=120)

    whole = _ask(device, TOKENS)
    answers: list[tuple[int, str]] = []
    done = threading.Event()

    def ask_again_and_again() -> None:
        while not done.is_set():
            answers.append(_ask(device, TOKENS))
            done.wait(0.02)

    with ThreadPoolExecutor(CLIENTS) as pool:
        asking = [pool.submit(ask_again_and_again) for _ in range(CLIENTS)]
        try:
            fleet.start_rollout("writer:2.0")
            assert fleet.decided() == {"one": "done"}, fleet.reasons()
            wait_until("version 2.0", lambda: _serves(device, releases, "2.0"), seconds=120)
        finally:
            done.set()
        for one in asking:
            one.result()
    # What had begun was let to its end; who came while neither version was loaded was told so.
    assert {answer for answer in answers if answer[0] == 200} == {whole}
    assert {status for status, _ in answers} == {200, 503}

    fleet.start_rollout("writer:3.0")
    assert fleet.decided() == {"one": "failed"}
    assert "golden" in fleet.reasons()["one"]
    wait_until("version 2.0 again", lambda: _serves(device, releases, "2.0"), seconds=120)

    for version, words in (("4.0", "would give back"), ("5.0", f"the device has {LIMIT}.0 MiB")):
        fleet.start_rollout(f"writer:{version}")
        assert fleet.decided() == {"one": "failed"}
        assert words in fleet.reasons()["one"]
        assert _serves(device, releases, "2.0")
    assert not list(device.state.glob("models/*/gives-way"))

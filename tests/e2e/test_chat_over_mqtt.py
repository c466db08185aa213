"""A language model in the field: compiled for two targets, rolled out to two agents over a broker, asked by OpenAI's
own client; a second version comes while answers stream."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import decoders, smollm2
from tests.support.brokers import Mosquitto
from tests.support.field import Device, Field

import kedge
from kedge.demo.processes import command_of, wait_until
from kedge.importing.decoders import tensors
from kedge_agent import Model
from kedge_protocol.bundle.layout import Layout

openai = pytest.importorskip("openai", reason="pip install --no-deps -r constraints/proofs.txt")

TARGETS = ("generic-cpu", "intel-cpu")
NAME = "assistant"
CLIENTS = 3
"""On each device: more than slots, so that one waits while the switch comes."""


@dataclass
class Written:
    """A streamed answer: what was written, when, and by which bundle."""

    text: str = ""
    began: float = 0.0
    ended: float = 0.0
    reason: str | None = None
    cached: int = -1
    bundles: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Story:
    """A model in two versions, and what is asked of it.

    Attributes:
        releases: version → release folder.
        messages: have a long answer.
        max_tokens: of an answer; the answers of both versions are unlike within these.
        known: stands in every answer; empty where answers are what the model writes alone, letter for letter. With
            int8 activations they need not be: steps of one position and of several differ in the last digits.
    """

    releases: Mapping[str, Path]
    messages: list[dict[str, str]]
    max_tokens: int
    known: str = ""

    def fingerprint(self, version: str, target: str) -> str:
        """What answers of this bundle carry."""
        return f"fp_{Layout(self.releases[version]).bundle(target).digest[7:19]}"

    def texts(self, version: str, target: str) -> set[str]:
        """The bundle's greedy answers, here and alone: to an empty cache, and where the prompt is in the cache."""
        with Model(self.releases[version], target=target) as model:
            return {model.generate(self.messages, max_tokens=self.max_tokens).text for _ in range(2)}

    def check(self, text: str, texts: set[str]) -> None:
        """Check an answer of the bundle that writes ``texts``."""
        assert self.known in text if self.known else text in texts


def tell(story: Story, folder: Path, broker: str | None) -> None:
    """Roll version 1 out, ask, roll version 2 out under load, and look at every answer."""
    fingerprints = {(v, t): story.fingerprint(v, t) for v in story.releases for t in TARGETS}
    texts = {(v, t): story.texts(v, t) for v in story.releases for t in TARGETS}
    assert story.known or not any(texts["1.0", target] & texts["2.0", target] for target in TARGETS)
    with Field(folder, broker) as fleet:
        for target in TARGETS:
            fleet.add(f"at-{target}", target, command_of("kedge-agent"))
        for release in story.releases.values():
            fleet.publish(release)
        fleet.start_rollout(f"{NAME}:1.0")
        assert set(fleet.decided().values()) == {"done"}, fleet.reasons()
        for device in fleet.devices:
            asked_quietly(device, story, fingerprints["1.0", device.target], texts["1.0", device.target])

        streams = {device.name: Streams(device, story) for device in fleet.devices}
        with ThreadPoolExecutor(CLIENTS * len(streams)) as pool:
            running = [pool.submit(one.run) for one in streams.values() for _ in range(CLIENTS)]
            try:
                for device in fleet.devices:
                    streams[device.name].wait(fingerprints["1.0", device.target])
                fleet.start_rollout(f"{NAME}:2.0")
                assert set(fleet.decided().values()) == {"done"}, fleet.reasons()
                for device in fleet.devices:
                    streams[device.name].wait(fingerprints["2.0", device.target])
            finally:
                for one in streams.values():
                    one.stop.set()
            for future in running:
                future.result(300)

        for device in fleet.devices:
            versions = {fingerprints[version, device.target]: version for version in story.releases}
            answers = streams[device.name].answers
            for answer in answers:
                (bundle,) = answer.bundles
                assert answer.reason in ("stop", "length")
                story.check(answer.text, texts[versions[bundle], device.target])
            old, new = ([one for one in answers if versions[min(one.bundles)] == version] for version in ("1.0", "2.0"))
            # The old version wrote its answers to their end while the new one began.
            assert max(one.ended for one in old) > min(one.began for one in new)
            assert max(one.began for one in old) < min(one.ended for one in new)
            # Nothing that the old version had read is taken for read.
            assert min(one.cached for one in new) == 0
            asked_quietly(device, story, fingerprints["2.0", device.target], texts["2.0", device.target])
            no_errors(fleet, device, fingerprints["2.0", device.target])


def asked_quietly(device: Device, story: Story, fingerprint: str, texts: set[str]) -> None:
    """One answer whole and one streamed; the second reads the prompt out of the cache."""
    with _client(device) as client:
        assert [one.id for one in client.models.list()] == [NAME]
        options: dict[str, Any] = {"model": NAME, "messages": story.messages, "max_tokens": story.max_tokens}
        whole = client.chat.completions.create(**options, temperature=0)
        story.check(whole.choices[0].message.content, texts)
        assert whole.system_fingerprint == fingerprint
        streamed = Written()
        _stream(client, story, streamed)
        story.check(streamed.text, texts)
        assert streamed.bundles == {fingerprint}
        assert streamed.cached == whole.usage.prompt_tokens - 1


def no_errors(fleet: Field, device: Device, fingerprint: str) -> None:
    """The device's telemetry counts answers of this bundle, and no error."""

    def told() -> dict[str, Any] | None:
        for seen in reversed(fleet.shown(device.name)["telemetry"]):
            found: dict[str, Any] | None = seen["models"].get(NAME)
            if found is not None and found["digest"][7:19] == fingerprint[3:] and found["inferences_total"]:
                return found
        return None

    assert wait_until(f"telemetry of {device.name}", told, seconds=120)["errors_total"] == 0


class Streams:
    """Clients of one device that ask again and again until :attr:`stop`."""

    def __init__(self, device: Device, story: Story) -> None:
        self.answers: list[Written] = []
        self.stop = threading.Event()
        self._device = device
        self._story = story
        self._failed = False

    def run(self) -> None:
        """Stream one answer after another."""
        try:
            with _client(self._device) as client:
                while not self.stop.is_set():
                    answer = Written()
                    _stream(client, self._story, answer)
                    self.answers.append(answer)
        except BaseException:
            self._failed = True
            raise

    def wait(self, fingerprint: str) -> None:
        """Wait for an answer of a bundle, or for a client that fails."""
        wait_until(
            f"an answer of {fingerprint} at {self._device.name}",
            lambda: self._failed or any(fingerprint in one.bundles for one in list(self.answers)),
            seconds=300,
        )


def _client(device: Device) -> Any:
    return openai.OpenAI(base_url=f"{device.endpoint}/v1", api_key="none", max_retries=0, timeout=180)


def _stream(client: Any, story: Story, into: Written) -> None:
    into.began = time.monotonic()
    for chunk in client.chat.completions.create(
        model=NAME,
        messages=story.messages,
        max_tokens=story.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    ):
        into.bundles.add(chunk.system_fingerprint)
        for choice in chunk.choices:
            into.text += choice.delta.content or ""
            into.reason = choice.finish_reason or into.reason
        if chunk.usage is not None:
            into.cached = chunk.usage.prompt_tokens_details.cached_tokens
    into.ended = time.monotonic()


def _compiled(model: Path, texts: Path, out: Path, version: str, **options: Any) -> Path:
    return kedge.compile(
        model,
        name=NAME,
        version=version,
        targets=list(TARGETS),
        calibration=texts / "calibration.txt",
        evaluation=texts / "evaluation.txt",
        out=out,
        **options,
    ).path


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> Story:
    """stories260K with a chat template, and the same with the matrices of its layers a little larger."""
    source, place = shared_data / "generation" / "stories260k", tmp_path_factory.mktemp("stories")
    releases = {}
    for name in ("calibration", "evaluation"):
        (place / f"{name}.txt").write_text("Once upon a time, there was a little girl. " * 60)
    for version, factor in (("1.0", 1.0), ("2.0", 1.05)):
        model = place / version
        model.mkdir()
        for file in ("config.json", "tokenizer.json"):
            (model / file).write_bytes((source / file).read_bytes())
        settings = json.loads((source / "tokenizer_config.json").read_text())
        settings["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        weights = tensors.of_folder(source)
        scaled = {name: _scaled(weights.read(name), factor if ".layers." in name else 1.0) for name in weights.names}
        decoders.write_tensors(model / "model.safetensors", scaled)
        releases[version] = _compiled(
            model, place, place / f"out-{version}", version, quantize="precision=float32", slots=2
        )
    return Story(releases, [{"role": "user", "content": "Once upon a time, there was a little"}], 400)


def _scaled(array: Any, factor: float) -> Any:
    return np.asarray(array * (factor if array.ndim == 2 else 1.0), np.float32)


@pytest.mark.shared_data
def test_a_second_version_comes_while_answers_stream_and_none_is_lost_or_mixed(stories: Story, tmp_path: Path) -> None:
    tell(stories, tmp_path, None)


@pytest.mark.campaign
@pytest.mark.shared_data
@pytest.mark.needs("mosquitto")
def test_the_same_on_mosquitto(stories: Story, tmp_path: Path, mosquitto: Mosquitto) -> None:
    tell(stories, tmp_path, mosquitto.url)


@pytest.mark.campaign
@pytest.mark.timeout(3600)
def test_smollm2_answers_at_two_devices_and_its_smaller_version_follows(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    place = tmp_path_factory.mktemp("smollm2")
    model = smollm2.folder(place / "model")
    smollm2.texts(place)
    options: dict[str, Any] = {"slots": 2, "context": 2048, "max_perplexity": "9x"}
    schemes = {"1.0": "precision=int8,method=plain", "2.0": "precision=int4,method=plain"}
    releases = {
        version: _compiled(model, place, place / f"out-{version}", version, quantize=scheme, **options)
        for version, scheme in schemes.items()
    }
    question = [{"role": "user", "content": "What is the capital of France? Tell me more about it."}]
    tell(Story(releases, question, 60, known="Paris"), tmp_path, None)

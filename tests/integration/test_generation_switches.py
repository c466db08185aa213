"""A language model in the serving process: switched while it writes, each answer is of one version, and the next is of
the new one; it may take what it declares."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.integration.test_serving_survives import Supervised
from tests.support import decoders
from tests.support.installed import install
from tests.support.waiting import wait_for

from kedge_agent import Model, room
from kedge_protocol import memory

Array = npt.NDArray[Any]

PROMPT = "Once upon a time"
SHORT, TOKENS = 300, 2500
"""The longer answers take several looks of the serving process at what is installed."""
CLIENTS = 3


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of a random language model that write unlike texts."""
    place = tmp_path_factory.mktemp("switches")
    # Without an end token each answer has as many tokens as are asked for.
    sizes = {"max_position_embeddings": 3000, "eos_token_id": None}
    return [
        decoders.writer(place, version=version, slots=2, changed=sizes, stored=partial(_scaled, factor))
        for version, factor in (("1.0", 1.0), ("2.0", 1.5))
    ]


def _scaled(factor: float, weight: Array) -> Array:
    return np.asarray(weight * factor, np.float32)


def _text(release: Path, tokens: int) -> str:
    with Model(release, target="generic-cpu") as model:
        return model.generate(PROMPT, max_tokens=tokens).text


def _streamed(serving: Supervised, began: threading.Event, tokens: int) -> str:
    connection = serving.connect()
    body = {"model": "writer", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(body))
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    text = ""
    for line in answer:
        event = line.decode().strip().removeprefix("data: ")
        if not event:
            continue
        if event == "[DONE]":
            return text
        text += json.loads(event)["choices"][0]["text"]
        began.set()
    raise AssertionError("the stream broke off")


def _asked_until(switched: threading.Event, serving: Supervised, began: threading.Event) -> list[str]:
    texts = []
    while not switched.is_set():
        texts.append(_streamed(serving, began, SHORT))
    return texts


@pytest.fixture
def serving(tmp_path: Path, releases: list[Path]) -> Iterator[Supervised]:
    install(tmp_path / "state", releases[0])
    one = Supervised(tmp_path / "state")
    try:
        yield one
    finally:
        one.stop()


def test_answers_that_stream_during_a_switch_are_whole_and_of_one_version(
    serving: Supervised, releases: list[Path], tmp_path: Path
) -> None:
    wanted = {str(number): _text(release, SHORT) for number, release in enumerate(releases, start=1)}
    assert wanted["1"] != wanted["2"]

    def ready(version: str) -> bool:
        connection = serving.connect()
        connection.request("GET", "/v2/models/writer")
        answer = connection.getresponse()
        found: dict[str, Any] = json.loads(answer.read())
        return answer.status == 200 and found["versions"] == [version]

    serving.wait(lambda: ready("1.0"))
    for number, old in ((2, "1"), (1, "2")):
        began, switched = threading.Event(), threading.Event()
        # More clients than slots, which ask until the switch is seen: it comes while they write and while they wait.
        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = [pool.submit(_asked_until, switched, serving, began) for _ in range(CLIENTS)]
            try:
                assert began.wait(60)
                install(tmp_path / "state", releases[number - 1])
                serving.wait(partial(ready, f"{number}.0"))
            finally:
                switched.set()
            texts = [text for answer in answers for text in answer.result(180)]
        assert wanted[old] in texts
        assert set(texts) <= set(wanted.values())
        assert _streamed(serving, threading.Event(), SHORT) == wanted[str(number)]


def test_answers_of_the_old_version_are_cut_off_when_their_time_is_over(
    releases: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "SWITCH_SECONDS", 0.0)
    state = tmp_path / "state"
    install(state, releases[0])
    with Model("writer", state=state) as model:
        # Eight, two at once: the last ones wait long after the switch.
        streams = [model.generate(PROMPT, stream=True, max_tokens=TOKENS) for _ in range(8)]
        install(state, releases[1])
        wait_for(lambda: model.loaded().version == "2.0", what="the second version")
        answers = [stream.finish() for stream in streams]
    assert answers[-1].reason == "timeout"
    whole = _text(releases[0], TOKENS)
    assert all(whole.startswith(answer.text) for answer in answers)
    assert sum(answer.text == whole for answer in answers) < len(answers)


def test_a_language_model_may_take_the_memory_that_it_declares(tmp_path: Path) -> None:
    release = decoders.writer(tmp_path, slots=2000)  # of whose caches nothing is touched
    install(tmp_path / "state", release)
    limit = 60 << 20  # more than the process takes before it loads a model, less than it takes with one
    one = Supervised(tmp_path / "state", memory_bytes=limit)
    try:
        one.wait(lambda: one.supervisor.said("writer") is not None)
        time.sleep(2.0)  # forty looks at its memory
        assert (memory.resident(one.supervisor.pid) or 0) > limit
        assert one.words == []
    finally:
        one.stop()

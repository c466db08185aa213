"""Kept answers: the same bytes to the same bundle get the same answer without a call, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.serving import ask

from kedge_agent import Model
from kedge_agent.call_cache import CallCache
from kedge_agent.counters import collect
from kedge_agent.serving.answer_cache import AnswerCache
from kedge_agent.serving.handler import Request, Response
from kedge_agent.serving.metrics import MetricsHandler
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_agent.slots import ModelFolder
from kedge_protocol.errors import InputError

pytestmark = pytest.mark.device
PATH = "/v2/models/tiny/infer"


def body(first: float = 0.0) -> bytes:
    array = samples(1)
    array[0, 0] = first
    tensor = {"name": "input", "datatype": "FP32", "shape": list(array.shape), "data": array.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def counted(handler: InferenceHandler) -> tuple[int, int]:
    (row,) = ask(handler, "GET", "/v2/models/tiny/stats").body["model_stats"]
    stats = row["inference_stats"]
    return stats["cache_hit"]["count"], stats["cache_miss"]["count"]


def test_a_request_that_comes_again_is_answered_without_a_call(tmp_path: Path) -> None:
    state = tmp_path / "state"
    install(state, make_bundle(tmp_path))
    models = ServedModels(state)
    models.scan()
    handler = InferenceHandler(models, cache=AnswerCache(1 << 20))
    first = ask(handler, "POST", PATH, body())
    calls = collect(ModelFolder(state, "tiny").counters).inferences
    assert [ask(handler, "POST", PATH, body()).body for _ in range(3)] == [first.body] * 3
    assert collect(ModelFolder(state, "tiny").counters).inferences == calls
    assert counted(handler) == (3, 1)
    assert ask(handler, "POST", PATH, body(2.0)).body != first.body
    assert counted(handler) == (3, 2)
    for _ in range(2):
        assert ask(handler, "POST", PATH, b"[]").status == 400
    assert counted(handler)[0] == 3

    metrics = MetricsHandler(models).route(Request("GET", "/metrics"))
    assert isinstance(metrics, Response)
    assert b'kedge_cache_lookups_total{model="tiny",found="hit"} 3' in bytes(metrics.body)  # type: ignore[arg-type]
    models.figures.renew({"tiny": models.get("tiny")}, period=0.0)  # type: ignore[dict-item]
    models.scan()
    serving = ModelFolder(state, "tiny").serving()
    assert serving is not None
    assert 0 < serving.figures["cache_hit_percent"] <= 60
    assert serving.figures["cpu_ms_per_inference"] > 0

    # Another bundle's answers are its own.
    install(state, make_bundle(tmp_path, version="2.0", seed=5))
    models.scan()
    second = ask(handler, "POST", PATH, body())
    assert second.body["model_version"] == "2.0"
    assert second.body["outputs"] != first.body["outputs"]


def test_without_a_cache_every_request_is_a_call(tmp_path: Path) -> None:
    state = tmp_path / "state"
    install(state, make_bundle(tmp_path))
    models = ServedModels(state)
    models.scan()
    handler = InferenceHandler(models)
    before = collect(ModelFolder(state, "tiny").counters).inferences
    for _ in range(3):
        ask(handler, "POST", PATH, body())
    assert collect(ModelFolder(state, "tiny").counters).inferences == before + 3
    assert counted(handler) == (0, 0)


def test_the_space_is_bounded_and_the_oldest_answers_go_first() -> None:
    cache = AnswerCache(10_000)
    keys = [cache.key("d", Request("POST", PATH, body=bytes([number]))) for number in range(5)]
    for key in keys:
        cache.put(key, Response(200, b"x" * 1988), 1)
        cache.get(keys[0])
    assert cache.get(keys[0]) is not None
    assert cache.get(keys[1]) is None
    assert cache.get(keys[4]) is not None
    assert len(cache) == 4
    cache.put(b"large", Response(200, b"x" * 5000), 1)
    cache.put(b"stream", Response(200, stream=iter(())), 1)
    cache.put(b"error", Response(500, b""), 1)
    assert [cache.get(key) for key in (b"large", b"stream", b"error")] == [None] * 3


def test_a_key_tells_bundles_routes_and_header_fields_apart() -> None:
    requests = [
        Request("POST", PATH, body=b"a"),
        Request("POST", PATH, body=b"b"),
        Request("POST", PATH, query="q", body=b"a"),
        Request("POST", "/v2/models/tiny/pipeline", body=b"a"),
        Request("POST", PATH, fields={"content-type": "image/png"}, body=b"a"),
        Request("POST", PATH, fields={"inference-header-content-length": "1"}, body=b"a"),
    ]
    keys = {AnswerCache.key("d", request) for request in requests} | {AnswerCache.key("e", requests[0])}
    assert len(keys) == 7
    assert AnswerCache.key("d", Request("POST", PATH, fields={"user-agent": "x"}, body=b"a")) in keys


def test_a_model_that_keeps_answers_calls_its_runtime_once(tmp_path: Path) -> None:
    state = tmp_path / "state"
    install(state, make_bundle(tmp_path))
    folder = ModelFolder(state, "tiny")
    with Model("tiny", state=state, cache_mib=1) as model:
        first = model(samples(2))
        kept = first.copy()
        first[:] = 0  # the caller's own
        assert np.array_equal(model(samples(2)), kept)
        assert np.array_equal(model(input=samples(2)), kept)
        assert np.array_equal(model({"input": samples(2)}), kept)
        assert not np.array_equal(model(samples(2).astype(np.float64) + 1), kept)
        assert model.cache is not None
        assert (model.cache.hits, model.cache.misses) == (1, 4)
        assert collect(folder.counters).inferences == 4
        with pytest.raises(InputError):
            model(samples(2)[:, :3])
        # Another bundle's answers are its own.
        install(state, make_bundle(tmp_path, version="2.0", seed=5))
        model.refresh()
        assert not np.array_equal(model(samples(2)), kept)
        assert (model.cache.hits, model.cache.misses) == (1, 5)


def test_kept_answers_of_a_model_are_bounded() -> None:
    cache = CallCache(10_000)
    for number in [0, 1, 0, 2, 0, 3, 0, 4]:
        cache.answer(bytes([number]), lambda: np.zeros(1988, np.uint8))
    assert len(cache) == 4
    assert (cache.hits, cache.misses) == (3, 5)
    cache.answer(bytes([0]), list)
    cache.answer(bytes([1]), list)
    assert (cache.hits, cache.misses) == (4, 6), "the one that was asked for longest ago is gone"
    cache.answer(b"large", lambda: np.zeros(5000, np.uint8))
    assert len(cache) == 4

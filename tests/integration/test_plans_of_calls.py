"""How a bundle's calls are run is chosen by measurement when it is proved, kept, followed and told."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.support.bundles import make_bundle, make_tflite_bundle, samples
from tests.support.installed import install
from tests.support.serving import ask

from kedge_agent import Model
from kedge_agent.proving import ProofLimits, prove
from kedge_agent.serving.handler import Job, Request
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_agent.serving.worker_pool import WorkerPool
from kedge_agent.slots import ModelFolder
from kedge_protocol import golden
from kedge_protocol.bundle.config import FileTensor, TensorSpec
from kedge_targets import registry
from kedge_targets.calls import plan as plans
from kedge_targets.calls.plan import CallPlan, Gathered
from kedge_targets.calls.tuning import are_apart
from kedge_targets.executor import Executor

pytestmark = pytest.mark.device


def _proved(folder: ModelFolder) -> CallPlan | None:
    """Prove the current bundle as the agent does; the plan that is kept."""
    slot = folder.current()
    assert slot is not None
    assert folder.cache is not None
    config = slot.bundle().config
    prove(slot.folder, config, ProofLimits(), folder.cache, lambda line: None)
    return plans.read(folder.cache, config)


@pytest.fixture
def tiny(tmp_path: Path) -> ModelFolder:
    install(tmp_path / "state", make_bundle(tmp_path))
    return ModelFolder(tmp_path / "state", "tiny")


def test_a_proof_keeps_a_plan_and_calls_follow_it(tiny: ModelFolder) -> None:
    plan = _proved(tiny)
    assert plan is not None
    cores = len(os.sched_getaffinity(0))
    assert plan.measured
    assert all(one.calls * one.options["threads"] <= cores for one in plan.measured)
    assert (plan.options, plan.at_once) in [(one.options, one.calls) for one in plan.measured]
    with Model("tiny", state=tiny.state) as model:
        assert model.loaded().plan == plan
        assert model.figures["calls_at_once"] == plan.at_once


def test_a_plan_for_another_number_of_cores_is_not_followed(tiny: ModelFolder) -> None:
    plan = _proved(tiny)
    slot, cache = tiny.current(), tiny.cache
    assert plan is not None
    assert slot is not None
    assert cache is not None
    plans.write(cache, slot.bundle().config, replace(plan, cores=plan.cores + 1))
    with Model("tiny", state=tiny.state) as model:
        assert model.loaded().plan is None
        assert model(samples(1)).shape == (1, 4)


def test_a_bundle_with_one_sample_a_call_has_only_ways_to_choose(tmp_path: Path, shared_data: Path) -> None:
    with np.load(shared_data / "eval" / "kws.npz") as found:
        raw = found["input"][:4].astype(np.float32)
    install(
        tmp_path / "state",
        make_tflite_bundle(tmp_path, (shared_data / "models" / "kws_dscnn_int8.tflite"), raw),
        "rpi4",
    )
    folder = ModelFolder(tmp_path / "state", "tiny")
    plan = _proved(folder)
    assert plan is not None
    assert not plan.gathered
    with Model("tiny", state=tmp_path / "state") as model, ThreadPoolExecutor(4) as pool:
        expected = [model(one[None]) for one in raw]
        for answers in pool.map(lambda _: [model(one[None]) for one in raw], range(8)):
            np.testing.assert_array_equal(answers, expected)


def test_interpreters_are_made_when_they_are_needed_though_the_name_is_gone(tmp_path: Path, shared_data: Path) -> None:
    file = tmp_path / "model.tflite"
    file.write_bytes((shared_data / "models" / "kws_dscnn_int8.tflite").read_bytes())
    runtime = registry.runtime("tflite")
    session = runtime.load(file, {"threads": 1, "instances": 3})
    one = runtime.load(file, {"threads": 1})
    file.unlink()
    assert session.concurrent
    with np.load(shared_data / "eval" / "kws.npz") as found:
        rows = np.rint(found["input"][:8]).clip(-128, 127).astype(np.int8)
    inputs = [row.reshape(1, 49, 10, 1) for row in rows]
    expected = [one.run([array])[0] for array in inputs]
    with ThreadPoolExecutor(6) as pool:
        for answers in pool.map(lambda _: [session.run([array])[0] for array in inputs], range(12)):
            np.testing.assert_array_equal(answers, expected)
    session.close()


@pytest.fixture
def gathered(tmp_path: Path) -> InferenceHandler:
    """The tiny model, whose calls are gathered by a plan."""
    install(tmp_path / "state", make_bundle(tmp_path))
    folder = ModelFolder(tmp_path / "state", "tiny")
    slot, cache = folder.current(), folder.cache
    assert slot is not None
    assert cache is not None
    limits = (Gathered(values=16, most=4, gain=2.0),)
    plans.write(cache, slot.bundle().config, CallPlan(cores=plans.cores(), options={"threads": 1}, gathered=limits))
    models = ServedModels(tmp_path / "state", workers=lambda name: WorkerPool(name, in_loop=True))
    models.scan()
    return InferenceHandler(models)


def _asked(rows: Any) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": list(rows.shape), "data": rows.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def test_gathered_requests_are_answered_each_and_counted_and_told(gathered: InferenceHandler) -> None:
    raw = samples(40)
    requests = [_asked(raw[number : number + 1 + number % 3]) for number in range(32)]
    requests[7] = _asked(raw[:1]).replace(b"[1, 16]", b"[1, 15]")
    expected = [ask(gathered, "POST", "/v2/models/tiny/infer", body) for body in requests]
    assert [answer.status for answer in expected] == [400 if number == 7 else 200 for number in range(32)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda body: ask(gathered, "POST", "/v2/models/tiny/infer", body), requests))
    for answer, alone in zip(answers, expected, strict=True):
        assert answer.status == alone.status
        if alone.status == 200:
            ours, theirs = (np.float32(one.body["outputs"][0]["data"]) for one in (answer, alone))
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
    job = gathered.route(Request("POST", "/v2/models/tiny/infer", body=requests[0]))
    assert isinstance(job, Job)
    # In the loop's thread calls would come one after the other, and none would wait for another.
    assert not job.pool.takes_here()
    assert job.pool.threads == 8
    calls = ask(gathered, "GET", "/v2/models/tiny").body["parameters"]["calls"]
    assert calls["gathered"] == [{"values": 16, "most": 4, "gain": 2.0}]
    config = ask(gathered, "GET", "/v2/models/tiny/config").body
    assert config["dynamic_batching"]["preferred_batch_size"] == [4]
    stats = ask(gathered, "GET", "/v2/models/tiny/stats").body["model_stats"][0]["batch_stats"]
    samples_run = sum(row["batch_size"] * row["compute_infer"]["count"] for row in stats)
    # The one that warms up counts too.
    assert samples_run == 1 + 2 * sum(1 + number % 3 for number in range(32) if number != 7)


def test_a_model_whose_samples_meddle_is_seen_and_not_gathered(tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0), helper.make_node("Div", ["x", "m"], ["y"])]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", tensors[:1], tensors[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "m.onnx")
    files = (FileTensor(name=name, index=0, shape=(None, 4), dtype="float32") for name in ("x", "y"))
    x, y = (TensorSpec(name=file.name, shape=file.shape, dtype="float32", file=file) for file in files)
    given = np.arange(1, 9, dtype=np.float32).reshape(2, 4)
    vectors = golden.Golden({"x": given}, {"y": given / 4}, {"y": golden.Tolerance(1e-3, 1e-3)})
    executor = Executor(
        tmp_path, backend="onnxruntime", entry="m.onnx", options={"threads": 1}, inputs=(x,), outputs=(y,)
    )
    assert not are_apart(executor, vectors)

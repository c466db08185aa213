"""MiniLM int8 behind HTTP: what is gained where requests that wait are gathered, as chosen by the proof."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, medians
from benchmarks.serving import Server, post
from benchmarks.serving_load import Target, load

CLIENTS = 8
REQUESTS = 160
ROUNDS = 3


def run() -> Iterator[Result]:
    """Requests of 16 and of 128 tokens, with the plan and with the same plan that gathers nothing."""
    from tests.support import minilm

    from kedge_agent.proving import ProofLimits, prove
    from kedge_agent.slots import ModelFolder
    from kedge_targets.calls import plan as plans

    if (absent := minilm.missing()) is not None:
        print(f"skipped: MiniLM ({absent} is not installed)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("gathered", "alone")]
        release = _release(Path(scratch))
        for folder in folders:
            _install(folder, release)
        slots = [ModelFolder(folder / "state", "minilm") for folder in folders]
        config = slots[0].current().bundle().config  # type: ignore[union-attr]
        caches = [slot.cache or Path() for slot in slots]
        prove(slots[0].current().folder, config, ProofLimits(), caches[0], lambda line: None)  # type: ignore[union-attr]
        plan = plans.read(caches[0], config)
        if plan is None:
            raise RuntimeError("no plan was kept")
        print(f"chosen: {plan.options}, {plan.at_once} at once; {plan.reason}")
        for one in plan.gathered:
            print(f"samples of up to {one.values} numbers: {one.most} in one call, {one.gain:.2f} times as fast")
        plans.write(caches[1], config, replace(plan, gathered=()))
        with Server(folders[0]) as gathered, Server(folders[1]) as alone:
            for tokens in (16, 128):
                request = _request(tokens)
                ours, theirs = medians(
                    ROUNDS,
                    *(
                        lambda server=server, request=request: load(
                            Target(server.port, request), server.pid, CLIENTS, REQUESTS
                        )
                        for server in (gathered, alone)
                    ),
                )
                yield Result(
                    f"MiniLM int8, {tokens} tokens, {CLIENTS} clients, requests gathered by the plan",
                    f"CPU a request, median of {ROUNDS} times {REQUESTS}", "ms", ours / 1000, theirs / 1000,
                    "the same server that gathers nothing", "≤1.1×", ours <= 1.1 * theirs,
                )  # fmt: skip


def _request(tokens: int) -> bytes:
    from tests.support import minilm

    found = minilm.feed([" ".join(minilm.calibration(40))], tokens)
    inputs = [
        {"name": name, "datatype": "INT64", "shape": list(array.shape), "data": array.ravel().tolist()}
        for name, array in found.items()
    ]
    return post("/v2/models/minilm/infer", json.dumps({"inputs": inputs}).encode())


def _release(folder: Path) -> Path:
    from tests.support import lowering, minilm
    from tests.support.bundles import Packed, write_bundle

    from kedge_protocol import golden
    from kedge_targets.numerics import Precision

    graph = folder / "minilm.onnx"
    minilm.export(graph)
    sentences = minilm.Sentences(minilm.calibration())
    made = lowering.lower("generic-cpu", graph, Precision.INT8, sentences, folder / "int8")
    given: dict[str, Any] = minilm.feed(minilm.held_out(8), 16)
    executor = lowering.executor("generic-cpu", made)
    found = executor.on_samples(given)
    executor.close()
    vectors = golden.Golden(given, found, {name: golden.Tolerance(0.05, 0.02) for name in found})
    packed = Packed(
        backend="onnxruntime", files=made.files, entry=made.entry, inputs=made.inputs, outputs=made.outputs,
        vectors=vectors, runtimes=made.runtimes, runtime_options=made.runtime_options, kernel_sets=("fused",),
    )  # fmt: skip
    return write_bundle(folder / "release", packed, name="minilm", version="1", target="generic-cpu")


def _install(folder: Path, release: Path) -> None:
    from tests.support.installed import install

    install(folder / "state", release)

"""int8 of many drawn graphs on one target: ``python -m tests.support.drawn.campaign TARGET COUNT [SEED [RECORD]]``.

Float ONNX Runtime says what is right. What it runs must be lowered, but for few, and each output is held against it.
RECORD is a file of JSON lines; what stands there is not run again, so that a long campaign can be interrupted."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from kedge_protocol.errors import KedgeError
from kedge_targets import registry, target
from kedge_targets.graph.rounding import sqnr_db
from kedge_targets.numerics import Plan, Precision
from tests.support import drawn
from tests.support.drawn.drawing import Graph
from tests.support.lowering import checked_copy, executor, lower

HEALTHY = 20.0
FRESH = 128
"""Samples that each output is held against."""
_MANY = 4096
"""Samples that judge an output which is below :data:`HEALTHY` on those: one sample of thousands may lie among them, far
outside of all others, and its error be most of the noise."""
_GRAPHS = 250
"""Of one process: OpenVINO (2026.4) leaves some mappings of memory behind with each model that ran, and ends a process
that has all 65530 of them ("err munmap")."""
_PLAN = Plan(default=Precision.INT8, guard=True)


@dataclass(frozen=True)
class Outcome:
    """Of one graph.

    Attributes:
        noise: output → dB on fresh samples; 0 dB is an answer of zeros.
        rare: the same on :data:`FRESH` of the samples, where these gave less than :data:`HEALTHY` and more do not.
        share: of the multiply-accumulates in integers; None of a graph that has none.
        kept: whether layers stay in float for it, and it is said.
        refused: why it was not lowered, and by which of its operators.
        broken: what was neither a refusal nor an answer.
    """

    seed: int
    noise: dict[str, float] = field(default_factory=dict)
    share: float | None = None
    kept: bool = False
    refused: str = ""
    broken: str = ""
    rare: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """dB of the worst output."""
        return min(self.noise.values(), default=float("inf"))


def outcome(graph: Graph, name: str, folder: Path) -> Outcome | None:
    """None where float ONNX Runtime does not run the graph, or a fresh sample makes no finite answer."""
    path = folder / "model.onnx"
    onnx.save(graph.model, path)
    try:
        session = onnxruntime.InferenceSession(str(path), _quiet(), providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_outputs()]
        feeds = _feeds(graph, FRESH)
        expected = _joined([dict(zip(names, session.run(None, feed), strict=True)) for feed in feeds])
    except Exception:  # noqa: BLE001 -- whatever the library raises: such a graph is nobody's
        return None
    if not all(np.isfinite(value).all() for value in expected.values()):
        return None
    compiler = registry.compiler(target.find(name).backends[0].name)
    rare: dict[str, float] = {}
    try:
        lowered = lower(name, checked_copy(path, folder), _PLAN, graph, folder / "out")
        run = executor(name, lowered)
        made = _joined([run(feed) for feed in feeds])
        noise = _noises(expected, made)
        if min(noise.values()) < HEALTHY:
            exact = _noises(_exact(graph, expected, feeds), made)
            feeds = _feeds(graph, _MANY)
            expected = _joined([dict(zip(names, session.run(None, feed), strict=True)) for feed in feeds])
            found = _noises(expected, _joined([run(feed) for feed in feeds]))
            rare, noise = noise, found | exact
    except KedgeError as error:
        return Outcome(graph.seed, refused=str(error))
    except Exception as error:  # noqa: BLE001 -- a fault, to be listed like one
        return Outcome(graph.seed, broken=f"{type(error).__name__}: {error}")
    numbers = compiler.numbers(lowered.files, {one: (1, *shape) for one, shape in graph.inputs.items()})
    share = None if numbers is None or not numbers.macs else numbers.integer_macs / numbers.macs
    return Outcome(graph.seed, noise, share, bool(lowered.floating), rare=rare)


def _exact(graph: Graph, expected: dict[str, Any], feeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return, for the outputs that ONNX Runtime does not know itself, what the evaluator of the onnx package computes:
    its sigmoid (1.31) is right to 1e-7 and not to a share of the answer, and gives 0 for that of -20, which is 2e-9."""
    try:
        evaluator = ReferenceEvaluator(graph.model, new_ops=[DequantizeLinear])
        made = _joined([dict(zip(expected, evaluator.run(None, feed), strict=True)) for feed in feeds])
    except Exception:  # noqa: BLE001 -- whatever it raises on what it does not know; then nobody knows better
        return {}
    return {name: made[name] for name in expected if sqnr_db(made[name], expected[name]) < HEALTHY}


class DequantizeLinear(OpRun):  # type: ignore[misc]
    """With one scale for all, which the evaluator has of later opsets only."""

    op_domain = ""

    def _run(self, codes: Any, scale: Any, **_: Any) -> tuple[Any]:
        return (codes.astype(np.float32) * scale,)


def _feeds(graph: Graph, count: int) -> list[dict[str, Any]]:
    """Return fresh samples, one by one for a graph with a fixed batch; more of them begin with the same."""
    fresh = graph.feed(count, 2)
    if graph.model.graph.input[0].type.tensor_type.shape.dim[0].dim_value != 1:
        return [fresh]
    return [{one: array[at : at + 1] for one, array in fresh.items()} for at in range(count)]


def _noises(expected: dict[str, Any], made: dict[str, Any]) -> dict[str, float]:
    return {one: _noise(array, made[one]) for one, array in expected.items()}


def _of_seed(seed: int, name: str) -> Outcome | None:
    with tempfile.TemporaryDirectory(prefix="drawn-") as folder:
        return outcome(drawn.graph(seed), name, Path(folder))


class _Children:
    """A process that is kept for many graphs, and started anew once it died."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Children:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def outcome(self, seed: int, name: str) -> Outcome | None:
        """As :func:`_of_seed`; a dead process is a fault of the graph."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=_GRAPHS)
        try:
            return self._pool.submit(_of_seed, seed, name).result()
        except BrokenProcessPool:
            self._pool = None
            return Outcome(seed, broken="the process died")


def _joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.concatenate([one[name] for one in answers]) for name in answers[0]}


def _noise(expected: Any, made: Any) -> float:
    if expected.shape != made.shape:
        return float("-inf")
    # A sigmoid of -20 is nothing, too.
    if np.abs(expected).max(initial=0.0) < 1e-6 and np.abs(made).max(initial=0.0) < 1e-3:
        return float("inf")
    return sqnr_db(expected, made)


def _quiet() -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return options


@dataclass(frozen=True)
class Summary:
    """Of many graphs on one target.

    Attributes:
        noisy: an output is below :data:`HEALTHY`, and no layer is said to stay in float.
        weak: likewise, although layers stay in float.
        rare: below it on few samples because of a rare one, and above it on many.
    """

    ran: int
    noisy: list[Outcome]
    weak: list[Outcome]
    broken: list[Outcome]
    refused: list[Outcome]
    shares: list[float]
    kept: int
    rare: list[Outcome]

    @property
    def refused_share(self) -> float:
        """Of the graphs that float ONNX Runtime runs."""
        return len(self.refused) / max(1, self.ran)

    def text(self) -> str:
        """For people."""
        median, tenth = np.percentile(self.shares, [50, 10]) if self.shares else (0.0, 0.0)
        lines = [
            f"{self.ran} graphs ran; {len(self.refused)} refused, {len(self.noisy)} below {HEALTHY:.0f} dB, "
            f"{len(self.broken)} broken, {self.kept} with layers in float ({len(self.weak)} of them below); "
            f"MACs in integers: median {median:.2f}, 10th percentile {tenth:.2f}"
        ]
        lines += [f"  seed {one.seed}: {_decibels(one)}; on {FRESH} samples {min(one.rare.values()):.1f}"
                  for one in self.rare]  # fmt: skip
        reasons = Counter(_kind(one.refused) for one in self.refused)
        seeds = {_kind(one.refused): one.seed for one in self.refused}
        lines += [f"  refused {count} (seed {seeds[why]}): {why}" for why, count in reasons.most_common(20)]
        lines += [f"  broken, seed {one.seed}: {one.broken[:300]}" for one in self.broken]
        lines += [f"  seed {one.seed}: {_decibels(one)}" for one in self.noisy]
        lines += [f"  seed {one.seed}, with layers in float: {_decibels(one)}" for one in self.weak]
        return "\n".join(lines)


def _kind(reason: str) -> str:
    """A refusal without the names and numbers of its graph: the operator and what is wrong."""
    return re.sub(r"\d+(\.\d+)?", "#", re.sub(r"(node|output|input|tensor) '[^']*'", r"\1", reason))[:160]


def _decibels(one: Outcome) -> str:
    return ", ".join(f"{name} {noise:.1f}" for name, noise in one.noise.items())


def campaign(name: str, seeds: Iterable[int], record: Path | None = None, *, apart: bool = False) -> Summary:
    """Lower all of them and hold them against float.

    Args:
        record: a file of JSON lines to which each outcome is added.
        apart: in another process, so that a library that ends it ends no campaign; one for many graphs.
    """
    lines = record.read_text().splitlines() if record is not None and record.exists() else []
    known = {found["seed"]: found for found in map(json.loads, lines)}
    outcomes = []
    with _Children() as children:
        for seed in seeds:
            if seed in known:
                one = Outcome(**known[seed]) if "noise" in known[seed] else None
            else:
                one = children.outcome(seed, name) if apart else _of_seed(seed, name)
                if record is not None:
                    with record.open("a") as file:
                        file.write(json.dumps({"seed": seed} if one is None else dataclasses.asdict(one)) + "\n")
            if one is not None:
                outcomes.append(one)
    low = [one for one in outcomes if one.worst < HEALTHY]
    return Summary(
        ran=len(outcomes),
        noisy=[one for one in low if not one.kept],
        weak=[one for one in low if one.kept],
        kept=sum(one.kept for one in outcomes),
        rare=[one for one in outcomes if one.rare and one.worst >= HEALTHY],
        broken=[one for one in outcomes if one.broken],
        refused=[one for one in outcomes if one.refused],
        shares=[one.share for one in outcomes if one.share is not None],
    )


if __name__ == "__main__":
    start = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    chosen = range(start, start + int(sys.argv[2]))
    drawn_operators = drawn.coverage(drawn.graph(seed) for seed in chosen)
    print({name: sorted(attributes) for name, attributes in sorted(drawn_operators.items())})
    print(campaign(sys.argv[1], chosen, Path(sys.argv[4]) if len(sys.argv) > 4 else None, apart=True).text())

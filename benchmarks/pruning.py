"""A pruned and repaired network against the whole one; heads of a sentence encoder before and after their repair."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Result, medians

Array = npt.NDArray[Any]

ROUNDS, CALLS = 40, 25
HEADS = 0.25
SENTENCES = 384
HEAD_STEPS = 100


def run() -> Iterator[Result]:
    """Channels of the digits CNN, by importance and at random; heads of MiniLM."""
    with tempfile.TemporaryDirectory() as scratch:
        yield from _channels(Path(scratch))
        yield from _heads(Path(scratch))


def session(graph: Path) -> Any:
    """One thread that does not spin, so that two sessions do not disturb each other."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(graph), settings, providers=["CPUExecutionProvider"])


def milliseconds(graph: Path, feed: dict[str, Array], calls: int) -> Any:
    """A measurement for :func:`benchmarks.harness.medians`: of one call, the mean of some, behind one that brings the
    weights back into the caches: an application calls the same model again and again."""
    made = session(graph)

    def measure() -> float:
        made.run(None, feed)
        start = time.perf_counter()
        for _ in range(calls):
            made.run(None, feed)
        return (time.perf_counter() - start) * 1000 / calls

    return measure


def _channels(folder: Path) -> Iterator[Result]:
    from tests.support import pruned_digits

    from kedge.pruning.importance import Importance

    trained = pruned_digits.network(folder)
    for importance in (Importance.TAYLOR, Importance.RANDOM):
        made = pruned_digits.pruned(trained, importance, folder / importance.value)
        feed = {"image": trained.held_out[:1]}
        whole, pruned = medians(
            ROUNDS, milliseconds(trained.graph, feed, CALLS), milliseconds(made.repaired, feed, CALLS)
        )
        before, after = (pruned_digits.drop(trained, graph) for graph in (made.cut, made.repaired))
        size = made.repaired.stat().st_size / trained.graph.stat().st_size
        control = importance is Importance.RANDOM
        yield Result(
            f"half of the channels, {'at random (control)' if control else 'by ' + importance.value}",
            f"one sample of the digits CNN; {size:.2f}× bytes; drop {before:.4f} before and {after:.4f} after "
            f"{pruned_digits.STEPS} steps of self-distillation without labels",
            "ms",
            pruned,
            whole,
            "the whole network, ONNX Runtime, one thread",
            "shown" if control else "≥1.8× as fast, drop ≤0.01",
            control or (whole >= 1.8 * pruned and after <= 0.01),
        )


def _heads(folder: Path) -> Iterator[Result]:
    from tests.support import minilm
    from tests.support.pruning import Samples, context

    from kedge.pruning.importance import Importance
    from kedge.steps.distil import Distil, DistilOptions
    from kedge.steps.prune_heads import PruneHeads, PruneHeadsOptions
    from kedge_targets.graph import model_reader, model_writer

    if (absent := minilm.missing()) is not None:
        print(f"skipped: heads of MiniLM ({absent} is not installed)")
        return
    graph = folder / "minilm.onnx"
    minilm.export(graph)
    whole = model_reader.load(graph)
    samples = Samples(**minilm.feed(minilm.calibration(SENTENCES)))
    long = minilm.feed([" ".join(minilm.calibration(40))], 128)
    wanted = meanings(graph)
    for importance in (Importance.TAYLOR, Importance.RANDOM):
        options = PruneHeadsOptions(ratio=HEADS, importance=importance)
        cut = PruneHeads(options).apply(whole, context(whole, samples, folder))
        repaired = Distil(DistilOptions(steps=HEAD_STEPS)).apply(cut, context(whole, samples, folder))
        before, after = folder / "cut.onnx", folder / "repaired.onnx"
        model_writer.save(cut, before)
        model_writer.save(repaired, after)
        told = [minilm.cosines(meanings(path), wanted) for path in (before, after)]
        first, second = medians(10, milliseconds(graph, long, 1), milliseconds(after, long, 1))
        cosines = " and ".join(f"{one.mean():.3f} (worst {one.min():.3f})" for one in told)
        yield Result(
            f"a quarter of MiniLM's heads, {importance.value}",
            f"128 tokens; mean cosine {cosines} before and after {HEAD_STEPS} steps of self-distillation",
            "ms",
            second,
            first,
            "the whole encoder, ONNX Runtime, one thread",
            "shown",
            True,
        )


def meanings(graph: Path) -> Array:
    """Of each held-out sentence by itself."""
    from tests.support import minilm

    made = session(graph)
    return np.concatenate([made.run(None, minilm.feed([sentence]))[0] for sentence in minilm.held_out()])

"""MiniLM's bundles against its float graph in ONNX Runtime: meaning, bytes and milliseconds at 128 tokens."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Result, turns, undisturbed
from benchmarks.pruning import meanings, milliseconds

ROUNDS, ROUNDS_OF_THE_PROOF = 40, 160
"""Of the proof a minute: phases in which others use the core take that long."""


def run() -> Iterator[Result]:
    """Static int8 with outliers apart, and weights of few bits."""
    from tests.support import lowering, minilm
    from tests.support.pruning import context

    from kedge.steps.equalize import Equalize, EqualizeOptions
    from kedge.steps.split_outliers import SplitOutliers, SplitOutliersOptions
    from kedge_targets.graph import model_reader, model_writer
    from kedge_targets.numerics import Plan, Precision

    if (absent := minilm.missing()) is not None:
        print(f"skipped: MiniLM ({absent} is not installed)")
        return
    sentences = minilm.Sentences(minilm.calibration())
    long = minilm.feed([" ".join(minilm.calibration(40))], 128)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        graph = folder / "minilm.onnx"
        minilm.export(graph)
        wanted = meanings(graph)
        stepped = model_reader.load(graph)
        used = context(stepped, sentences, folder)
        stepped = SplitOutliers(SplitOutliersOptions(widening=False)).apply(stepped, used)
        used.plan.layers.update(used.layers)
        stepped = Equalize(EqualizeOptions(spread=5.0, strength=0.6)).apply(stepped, used)
        model_writer.save(stepped, folder / "stepped.onnx")
        ways: dict[str, tuple[Path, Any]] = {
            "split-outliers + equalize + int8": (
                folder / "stepped.onnx",
                Plan(default=Precision.INT8, layers=dict(used.layers)),
            ),
            **{
                precision.value: (graph, precision)
                for precision in (
                    Precision.INT8, Precision.INT8_DYNAMIC, Precision.INT4, Precision.CODEBOOK4, Precision.LOG4,
                    Precision.CODEBOOK8, Precision.LOG8,
                )
            },
        }  # fmt: skip
        for label, (source, plan) in ways.items():
            lowered = lowering.lower("generic-cpu", source, plan, sentences, folder / label.split()[0])
            made = lowered.files[lowered.entry]
            told = minilm.cosines(meanings(made), wanted)
            size = lowering.size(lowered) / graph.stat().st_size
            proof = not isinstance(plan, Precision)
            rounds = ROUNDS_OF_THE_PROOF if proof else ROUNDS
            floats, integers = turns(rounds, milliseconds(graph, long, 3), milliseconds(made, long, 3))
            faster = undisturbed(floats) / undisturbed(integers)
            four = isinstance(plan, Precision) and plan.weight_bits == 4
            good = told.mean() >= 0.99 and told.min() >= 0.98 and size <= 0.3 and faster >= 1.8
            yield Result(
                f"MiniLM, {label}",
                f"128 tokens; cosine with float {told.mean():.4f} in the mean, {told.min():.4f} at worst on "
                f"{len(told)} held-out sentences; {size:.3f}× bytes; {faster:.2f}× as fast in the quickest tenth "
                f"of the rounds",
                "ms",
                statistics.median(integers),
                statistics.median(floats),
                "the float graph, ONNX Runtime, one thread",
                "≥0.99, ≥0.98, ≤0.3×, ≥1.8× as fast undisturbed" if proof else ("≥0.97" if four else "shown"),
                good if proof else (not four or bool(told.mean() >= 0.97)),
            )

"""The worker's task that measures a bundle's examples: raw items through the whole pipeline, by every kernel set."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from kedge.evaluation.worker_messages import Program
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_targets import registry
from kedge_targets.pipeline import examples
from kedge_targets.pipeline.execution import Runner
from kedge_targets.pipeline.neighbours import Neighbours
from kedge_targets.pipeline.others import Neighbour
from kedge_targets.proof import read_config
from kedge_targets.worker import Progress

TASK = "kedge.evaluation.pipeline_examples:measure"


@dataclass(frozen=True, kw_only=True)
class ExamplesRequest:
    """Measure examples of a lowered model.

    Attributes:
        files: what the pipeline names, by title.
        raws: folder of raw items.
        file: that is written.
        others: the bundles to which the pipeline goes on, by model.
    """

    program: Program
    pipeline: Pipeline
    labels: tuple[str, ...]
    raws: str
    file: str
    files: dict[str, str] = field(default_factory=dict)
    others: dict[str, Neighbour] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ExamplesAnswer:
    """How many examples were written; no file where there are none."""

    count: int


def measure(request: ExamplesRequest, progress: Progress) -> ExamplesAnswer:
    """Run raw items by every kernel set and keep those on which all agree.

    Raises:
        InputError, MissingDependencyError: see :class:`kedge_targets.pipeline.execution.Runner`.
        VerificationError: a kernel set refuses the file.
    """
    runner = Runner(
        request.pipeline,
        request.program.inputs,
        request.labels,
        lambda title: Path(request.files[title]).read_text(encoding="utf-8"),
    )
    raws = [path.read_bytes() for path in sorted(Path(request.raws).iterdir())]
    sets = registry.runtime(request.program.backend).kernel_sets_for(request.program.options)
    with contextlib.ExitStack() as stack:
        executors = [request.program.open(name) for name in sets]
        for executor in executors:
            stack.callback(executor.close)
        others = Neighbours(request.others, read_config)
        stack.callback(others.close)
        found = examples.chosen(raws, runner, executors, others=others)
    if found:
        examples.save(found, Path(request.file))
    return ExamplesAnswer(count=len(found))

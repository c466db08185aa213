"""The compiler's public door."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from kedge.compiler import service
from kedge.compiler.release import Release
from kedge.search.effort import Effort
from kedge.search.options import CompileOptions
from kedge.search.results import ProgressCallback
from kedge_protocol.bundle.pipeline import Task
from kedge_protocol.errors import ConfigError
from kedge_protocol.spelling import known_names


def compile(  # noqa: A001 -- kedge.compile is the public name
    model: str | os.PathLike[str] | object,
    *,
    name: str,
    version: str,
    targets: Sequence[str],
    calibration: str | os.PathLike[str],
    evaluation: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_drop: float = 0.01,
    min_agreement: float | None = None,
    confidence: float | None = None,
    max_size: str | int | None = None,
    max_latency: float | None = None,
    effort: str = "normal",
    time_limit: float | None = None,
    recipe: str | os.PathLike[str] | None = None,
    step: Sequence[str] = (),
    quantize: str | None = None,
    preprocess: str | Sequence[str] | None = None,
    task: str | None = None,
    pipeline: str | os.PathLike[str] | None = None,
    calibration_samples: int | None = None,
    evaluation_samples: int | None = None,
    metric: str | None = None,
    annotations: str | os.PathLike[str] | None = None,
    loss: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    deadline: float = 3600.0,
    memory_limit: int | None = None,
    force: bool = False,
    batch: int | None = None,
    batch_axes: Mapping[str, int | None] | None = None,
    states: Mapping[str, str] | None = None,
    seed: int | None = None,
    jobs: int | None = None,
    checkpoints: str | os.PathLike[str] | None = None,
    latencies: str | os.PathLike[str] | None = None,
    scheduler: str | None = None,
    target_fps: float | None = None,
    max_utilization: float | None = None,
    bitfile: str | os.PathLike[str] | None = None,
    progress: ProgressCallback | None = None,
) -> Release:
    """Compile a trained model into a release: one bundle for each target, in an OCI image layout at ``out``.

    Args:
        model: an ONNX file, ``file.py:factory`` or ``module:factory`` of PyTorch, a ``.pt2`` exported program, a
            ``.keras`` file, a SavedModel folder, a float ``.tflite`` file; or a ``torch.nn.Module``. It is never
            changed.
        name: of the model in the fleet.
        version: of the release.
        targets: names (``rpi4``) or paths of target files (``./board.toml``).
        calibration: samples for quantization: an ``.npz`` or a folder of ``.npy`` files, one array for each input by
            its name (or ``input`` where there is one), first axis samples. With a pipeline also pictures or wav files
            in class folders, COCO JSON, a ``data.yaml``, a CSV, JSON lines or lines of text.
        evaluation: at least 8 other samples, likewise, with ``label`` where there are labels.
        out: the folder that is made.
        max_drop: how much worse than the float model's the metric may be.
        min_agreement: share of the evaluation samples that must get the float model's own answer, right or wrong.
        confidence: how surely the drop must be shown to be within ``max_drop`` (0.95): the end of its interval decides.
            None: the measured drop itself does.
        max_size: of the files, ``200k``, ``1.5MB`` or ``0.3x`` of the model's file; a number is bytes.
        max_latency: milliseconds of one call with one sample on the target; where the target is not this machine, see
            ``latencies``.
        effort: ``quick`` (the usual precision, else float), ``normal`` (where that does not keep the budget: other
            ranges, equalization, mixed precision, fine-tuning, pruning, cheapest first), ``high`` (the whole front).
        time_limit: seconds after which the search begins no other candidate and takes the best so far; each target's
            first is tried in any case. By default 1800 with effort ``normal``, 600 with ``quick``, none with ``high``.
        recipe: a ``recipe.toml``, done instead of a search.
        step, quantize: the same in short, ``("prune-channels:ratio=0.5", "distil")``, ``"precision=int8"``.
        preprocess: ``scale=1/255,mean=0.5,std=0.5``, per channel with colons, for several inputs one text each,
            beginning with ``NAME:``.
        task: the ready pipeline that makes tensors of pictures, sounds or texts, and answers of the outputs:
            ``classification``, ``detection``, ``segmentation``, ``embedding``, ``text-classification``,
            ``audio-classification`` or ``ocr``.
        pipeline: a ``pipeline.toml`` of your own.
        calibration_samples, evaluation_samples: items of a folder that are taken at most; 512, and all, by default.
        metric: a known one (:mod:`kedge.evaluation.metrics`), ``KIND`` or ``KIND:OUTPUT``; or ``file.py:function`` of
            your own, ``function(outputs, inputs, labels) -> float``, with dicts of arrays by name, ``labels`` an array
            or None, higher is better. Without it: see :func:`kedge.evaluation.metric.choose`.
        annotations: COCO JSON, a folder of YOLO text files, an ``.npy`` or a ``.txt``, for the evaluation samples of a
            data set without ``label``; see :mod:`kedge.evaluation.labels`.
        loss: ``file.py:function`` of your own for fine-tuning with the labels of the calibration samples,
            ``function(outputs, inputs, labels) -> torch scalar``. Without it: self-distillation from the float model.
        labels: a file of class names, one on each line.
        deadline: seconds that one step may take.
        memory_limit: MiB that one step may take; four fifths of the machine's memory by default.
        force: replace ``out`` if it is there: a release or an empty folder, nothing else.
        batch: fix the batch of a model that is imported.
        batch_axes: tensor's name → which of its axes is the batch, None for a tensor without one, where the model's
            file does not tell.
        states: input → output that it takes in each call from the call before, where names do not tell
            (``state`` and ``stateN``, ``h_in`` and ``h_out``); see docs/metrics.md.
        seed: of everything random. The same seed and the same recorded latencies give the same choice.
        jobs: trials at once; one for each core by default.
        checkpoints: a folder where training keeps its state and goes on from it.
        latencies: what `kedge device latencies` wrote, or ``search.json`` of an earlier release.
        scheduler: address of a Dask scheduler; trials run there.
        target_fps, max_utilization, bitfile: for programmable logic, see docs/fpga.md.
        progress: called with who (a target's name, ``reference``, ``data``), what, done, total; from several threads.

    Returns:
        The release. Where some targets could not be compiled the others are still written, and
        ``release.failures`` maps each failed target to its error; only when none could be is an error raised.

    Raises:
        InputError: the model, a data set, a target or an option is wrong (:class:`kedge.errors.ModelError`, …).
        BudgetError: no target keeps the budget; what came nearest is kept in the folder ``OUT.nearest``.
        CompileError: no target could be compiled.
        MissingDependencyError: Python older than 3.11, or the ``compile`` extra or a toolchain is missing.
        StorageError: ``out`` exists, or the disk is full. In every such case ``out`` is as it was before.
    """
    options = CompileOptions(
        name=name,
        version=version,
        targets=_several(targets),
        calibration=Path(calibration),
        evaluation=Path(evaluation),
        out=Path(out),
        max_drop=max_drop,
        min_agreement=min_agreement,
        confidence=confidence,
        max_size=None if max_size is None else str(max_size),
        max_latency=max_latency,
        effort=_effort(effort),
        time_limit=time_limit,
        recipe=_path(recipe),
        step=_several(step),
        quantize=quantize,
        preprocess=_several(preprocess or ()),
        task=None if task is None else _task(task),
        pipeline=_path(pipeline),
        calibration_samples=calibration_samples,
        evaluation_samples=evaluation_samples,
        metric=metric,
        annotations=_path(annotations),
        loss=loss,
        labels=_path(labels),
        deadline=deadline,
        memory_limit=memory_limit,
        force=force,
        batch=batch,
        batch_axis=tuple(f"{name}={'none' if axis is None else axis}" for name, axis in (batch_axes or {}).items()),
        state=tuple(f"{name}={output}" for name, output in (states or {}).items()),
        seed=seed,
        jobs=jobs,
        checkpoints=_path(checkpoints),
        latencies=_path(latencies),
        scheduler=scheduler,
        target_fps=target_fps,
        max_utilization=max_utilization,
        bitfile=_path(bitfile),
    )
    source = Path(model) if isinstance(model, os.PathLike) else model
    return service.run(source, options, on_progress=progress)


def _path(given: str | os.PathLike[str] | None) -> Path | None:
    return None if given is None else Path(given)


def _several(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _effort(name: str) -> Effort:
    try:
        return Effort(name)
    except ValueError as error:
        remedy = known_names(name, [one.value for one in Effort])
        raise ConfigError(f"{name!r} is no effort", where="effort", remedy=remedy) from error


def _task(name: str) -> Task:
    try:
        return Task(name)
    except ValueError as error:
        remedy = known_names(name, [one.value for one in Task])
        raise ConfigError(f"{name!r} is no task", where="task", remedy=remedy) from error

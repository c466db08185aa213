"""Runs a compilation: checks the input, runs the float reference beside the first lowering, searches for each target,
and writes the release."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.compiler import costs, emulated_proof, normalized_arrays, preparation, release_writer, teachers, validation
from kedge.compiler.decoders import service as decoders
from kedge.compiler.pipelines import PipelineJob
from kedge.compiler.release import Release
from kedge.compiler.validation import ValidatedRequest
from kedge.evaluation import metric, preprocessing, worker_messages
from kedge.evaluation import model as modelling
from kedge.evaluation.dataset import Data, Dataset, Scan
from kedge.evaluation.golden import LEAST
from kedge.evaluation.model import Model
from kedge.importing import api as importing
from kedge.importing.decoders import reading as decoder_reading
from kedge.importing.worker_messages import Imported
from kedge.report import document
from kedge.search import sensitivity_job
from kedge.search.clock import Clock
from kedge.search.effort import Effort
from kedge.search.latency import Measurement
from kedge.search.local_trials import LocalTrials, Trials
from kedge.search.options import CompileOptions
from kedge.search.results import Compiled, Failed, Job, ProgressCallback, ReleaseSource
from kedge.search.search import Search
from kedge_protocol import memory
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import CompileError, ConfigError, DatasetError, KedgeError, StorageError
from kedge_targets.target import Target
from kedge_targets.worker import Worker

Array = npt.NDArray[Any]

_MEMORY_SHARE = 0.8


def run(
    model: str | Path | object,
    options: CompileOptions,
    *,
    on_progress: ProgressCallback | None = None,
    iterables: Mapping[str, Iterable[Any]] | None = None,
) -> Release:
    """Run a compilation; see :func:`kedge.compile`.

    Args:
        on_progress: receives progress, from several threads.
        iterables: ``calibration`` and ``evaluation`` if they are not paths.
    """
    validation.check_environment()
    named = isinstance(model, (str, Path))
    if isinstance(model, (str, Path)) and decoder_reading.is_decoder(Path(model)):
        with _scratch(options.out) as scratch:
            made = partial(_worker, limit=options.memory_limit)
            return decoders.run(Path(model), options, scratch, made, on_progress or _silent)
    asked = validation.check(str(model) if named else "", options)
    with _scratch(options.out) as scratch:
        compilation = _Compilation(
            model if not named else None, asked, scratch, on_progress or _silent, iterables or {}
        )
        return compilation.run()


def _silent(who: str, what: str, done: int, total: int) -> None:
    """Ignore progress."""


def _worker(name: str, limit: int | None) -> Worker:
    allowed = limit << 20 if limit is not None else int(memory.physical() * _MEMORY_SHARE)
    return Worker(name=name, memory_limit=allowed)


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Create a working folder beside OUT: on the same file system, and independent of a small /tmp."""
    try:
        parent = out.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.work-", dir=parent))
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(out)) from error
    try:
        yield folder
    except OSError as error:
        raise StorageError(
            f"cannot be written: {error.strerror}", where=str(out), remedy="Free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, kw_only=True)
class _Inputs:
    """The user's checked data."""

    model: Model
    imported: Imported | None
    pipeline: PipelineJob
    calibration: Data
    evaluation: Data
    calibration_digest: str
    evaluation_digest: str
    warnings: list[str]
    notes: tuple[str, ...] = ()


class _Compilation:
    """One compilation. Its threads and workers live as long as :meth:`run`."""

    def __init__(
        self,
        model: object | None,
        asked: ValidatedRequest,
        scratch: Path,
        on_progress: ProgressCallback,
        iterables: Mapping[str, Iterable[Any]],
    ) -> None:
        self._object = model
        self._iterables = iterables
        self._asked = asked
        self._options = asked.options
        self._scratch = scratch
        self._on_progress = on_progress
        self._began = time.perf_counter()
        self._clock = Clock.of(asked.options.effort, asked.options.time_limit)
        self._seconds: dict[str, float] = {}
        self._measurements: list[Measurement] = []

    def run(self) -> Release:
        targets = self._asked.targets
        # The threads outlive the workers: a worker's child dies with the thread that started it.
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=2))
            floating = stack.enter_context(self._worker("reference"))
            first = stack.enter_context(self._worker(targets[0].name))
            # Whatever ends this, nobody waits for what the workers are at.
            stack.callback(first.stop)
            stack.callback(floating.stop)
            warmed = pool.submit(self._warm, first, targets[0])
            data = self._read(pool, floating)
            warmed.result()
            preprocess = preprocessing.parse(self._options.preprocess, data.model.inputs)
            job = Job(
                options=self._options,
                budget=self._asked.budget(data.model.float_bytes),
                model=data.model,
                calibration=data.calibration,
                evaluation=data.evaluation,
                preprocess=preprocess,
                reference=pool.submit(self._reference, floating, data, preprocess),
                record=self._asked.record,
                seed=self._asked.seed,
                scratch=self._scratch,
                on_progress=self._on_progress,
                clock=self._clock,
            )
            sensitivity = sensitivity_job.SensitivityJob(job, targets, floating, pool)
            if self._options.effort is not Effort.QUICK:
                sensitivity.start()
            results = []
            for target in targets:
                worker = first if target is targets[0] else stack.enter_context(self._worker(target.name))
                results.append(self._one(target, job, worker, sensitivity, data.pipeline))
                pool.submit(worker.close)  # its end is not waited for
            source = self._source(job, data)
            results = [self._emulated(one, source, job) if isinstance(one, Compiled) else one for one in results]
            compiled = [result for result in results if isinstance(result, Compiled)]
            failed = [result for result in results if isinstance(result, Failed)]
            latency = self._reference_latency(floating, job)
            pool.submit(floating.close)
            told = document.RunInfo(
                file=self._asked.name or type(self._object).__name__,
                latency=latency,
                warnings=[*data.warnings, *data.pipeline.warnings, *sensitivity.warnings],
                seconds=self._seconds,
                sensitivity=sensitivity.found,
                notes=data.notes,
                began=self._began,
            )
            if not compiled:
                raise _all_failed(failed, release_writer.nearest(self._options.out, source, failed, told))
            return release_writer.release(self._options, source, compiled, failed, told, self._measurements)

    def _worker(self, name: str) -> Worker:
        return _worker(name, self._options.memory_limit)

    def _warm(self, worker: Worker, target: Target) -> None:
        worker.call(
            "kedge.evaluation.worker_tasks:warm",
            worker_messages.WarmRequest(backend=target.backends[0].name, metric=metric.absolute(self._options.metric)),
            worker_messages.Done,
            deadline=self._options.deadline,
        )

    def _read(self, pool: ThreadPoolExecutor, worker: Worker) -> _Inputs:
        """Read both data sets while the worker reads the model; an imported model may need samples first."""
        began = time.perf_counter()
        direct = self._object is None and self._asked.is_onnx and self._options.batch is None
        imported: Imported | None = None
        if self._asked.raw_data or self._iterables:
            # A pipeline makes tensors of the size that the model takes, so the model comes first.
            imported = None if direct else self._import(worker, {})
            model = self._prepare(worker, imported)
            pipeline = PipelineJob.of(self._asked, model)
            pipeline.iterables = self._iterables
            calibration, calibration_scan = self._dataset("calibration", worker, model, pipeline)
            evaluation, evaluation_scan = self._dataset("evaluation", worker, model, pipeline)
        else:
            early = pool.submit(self._prepare, worker, None) if direct else None
            arrays = PipelineJob(pipeline=None)
            try:
                calibration, calibration_scan = self._dataset("calibration", worker, None, arrays)
                evaluation, evaluation_scan = self._dataset("evaluation", worker, None, arrays)
            except KedgeError:
                if early is not None:
                    early.result()  # what is wrong with the model is said first
                raise
            imported = None if direct else self._import(worker, calibration.arrays)
            model = early.result() if early is not None else self._prepare(worker, imported)
            pipeline = PipelineJob.of(self._asked, model)
        calibration.check_missing(calibration_scan, taken=model.takes_missing)
        evaluation.check_missing(evaluation_scan, taken=model.takes_missing)
        self._options = pipeline.normalizing(self._options)
        found = _Inputs(
            model=model,
            imported=imported,
            pipeline=pipeline,
            calibration=self._bound(calibration, model, worker, pipeline),
            evaluation=self._bound(evaluation, model, worker, pipeline),
            calibration_digest=calibration_scan.digest(calibration.names),
            evaluation_digest=evaluation_scan.digest(evaluation.names),
            warnings=[*preparation.shared(calibration_scan, evaluation_scan), *preparation.few(calibration.samples)],
        )
        if found.evaluation.samples < LEAST:
            raise DatasetError(
                f"has {found.evaluation.samples} samples, at least {LEAST} are needed",
                where=evaluation.where,
                remedy="Golden vectors are taken from it",
            )
        labels = self._asked.labels
        scored = pipeline.pipeline is None or pipeline.pipeline.scores is not None
        if labels and scored and model.outputs[0].shape and model.outputs[0].shape[-1] not in (None, len(labels)):
            raise ConfigError(
                f"holds {len(labels)} names, output {model.outputs[0].name!r} has {model.outputs[0].shape[-1]}",
                where=f"--labels {self._options.labels}",
            )
        slim, notes = preparation.without_dead_channels(
            model, found.calibration, self._options, worker, scratch=self._scratch
        )
        judged, told = teachers.with_teacher(slim, self._asked, calibration.arrays, worker, scratch=self._scratch)
        self._seconds["read"] = time.perf_counter() - began
        return replace(found, model=judged, notes=(*(() if imported is None else imported.notes), *notes, *told))

    def _bound(self, dataset: Dataset, model: Model, worker: Worker, pipeline: PipelineJob) -> Data:
        data = dataset.bind(model.inputs, model.states)
        if (
            pipeline.pipeline is not None
            and pipeline.pipeline.picture is not None
            and not self._asked.options.preprocess
        ):
            how = preprocessing.parse(self._options.preprocess, model.inputs)
            role = dataset.where.partition(" ")[0]
            data, notes = normalized_arrays.turned_back(data, model.inputs, how, role=role, scratch=self._scratch)
            pipeline.warnings += notes
        data = preparation.with_class_numbers(data, model, dataset.where, scratch=self._scratch)
        return preparation.with_states(
            data, model, self._options, worker, scratch=self._scratch, on_progress=self._on_progress
        )

    def _import(self, worker: Worker, arrays: Mapping[str, Array]) -> Imported:
        self._on_progress("model", "import", 0, 0)
        began = time.perf_counter()
        folder = self._scratch / "import"
        folder.mkdir()
        examples = {}
        for name, array in arrays.items():
            if name != "label":
                raw = np.asarray(array[: importing.rows_kept(arrays)])
                # What preprocessing gives is float32.
                examples[name] = raw.astype(np.float32) if self._options.preprocess or raw.dtype.kind == "f" else raw
        request = importing.request(
            self._asked.model if self._object is None else self._object,
            workdir=folder,
            inputs=examples,
            batch=self._options.batch,
            trust_pickle=self._options.trust_pickle,
        )
        made = worker.call(importing.TASK, request, Imported, deadline=self._options.deadline)
        self._seconds["import"] = time.perf_counter() - began
        return made

    def _prepare(self, worker: Worker, imported: Imported | None) -> Model:
        path = str(Path(self._asked.model).absolute()) if imported is None else imported.graph
        return worker.call(
            "kedge.evaluation.model:prepare",
            modelling.PrepareRequest(
                model=path,
                graph=str(self._scratch / "graph.onnx"),
                digest=None if imported is None else imported.source_digest,
                size_bytes=None if imported is None else imported.size_bytes,
                batch_axes=self._options.batch_axes,
                states=self._options.states,
            ),
            Model,
            deadline=self._options.deadline,
        )

    def _dataset(self, role: str, worker: Worker, model: Model | None, pipeline: PipelineJob) -> tuple[Dataset, Scan]:
        self._on_progress("data", role, 0, 0)
        scratch = self._scratch / role
        scratch.mkdir()
        dataset = pipeline.dataset(
            worker,
            self._asked,
            model,
            role,
            scratch,
            lambda what, done, total: self._on_progress("data", what, done, total),
        )
        return dataset, dataset.scan()

    def _reference(
        self, worker: Worker, data: _Inputs, preprocess: dict[str, Preprocess]
    ) -> worker_messages.ReferenceAnswer:
        answer = worker.call(
            "kedge.evaluation.worker_tasks:reference",
            worker_messages.ReferenceRequest(
                model=data.model.reference,
                inputs=data.model.inputs,
                outputs=data.model.outputs,
                data=data.evaluation,
                preprocess=preprocess,
                metric=metric.absolute(self._options.metric),
                min_agreement=self._options.min_agreement is not None,
                batch=1 if data.model.fixed_batch else data.model.batch,
                folder=str(self._scratch / "reference"),
            ),
            worker_messages.ReferenceAnswer,
            deadline=self._options.deadline,
            on_progress=lambda what, done, total: self._on_progress("reference", "evaluate", done, total),
        )
        self._seconds["reference"] = answer.seconds
        data.pipeline.settle(data.model, answer)
        return answer

    def _one(
        self,
        target: Target,
        job: Job,
        worker: Worker,
        sensitivity: sensitivity_job.SensitivityJob,
        pipeline: PipelineJob,
    ) -> Compiled | Failed:
        began = time.perf_counter()
        section = None if self._asked.recipe is None else self._asked.recipe.section(target.name)
        with contextlib.ExitStack() as stack:
            local_trials = LocalTrials(target, job, worker, self._worker, self._options.jobs)
            stack.callback(local_trials.close)
            search = Search(
                target,
                job,
                local_trials,
                sensitivity,
                section=section,
                trials=self._trials(target, job, local_trials, stack),
            )
            result = search.run()
            if isinstance(result, Compiled):
                result = costs.measured(worker, result, job.evaluation, self._scratch, self._options.deadline)
                result = pipeline.measured(worker, result, job.evaluation, self._scratch, self._options.deadline)
        self._measurements += search.measurements
        self._seconds[f"target {target.name}"] = time.perf_counter() - began
        self._on_progress(target.name, "done" if isinstance(result, Compiled) else "failed", 1, 1)
        return result

    def _emulated(self, compiled: Compiled, source: ReleaseSource, job: Job) -> Compiled | Failed:
        began = time.perf_counter()
        result = emulated_proof.proved(compiled, source, job)
        if result is not compiled:
            self._seconds[f"emulation {compiled.target.name}"] = time.perf_counter() - began
        return result

    def _trials(self, target: Target, job: Job, local_trials: LocalTrials, stack: contextlib.ExitStack) -> Trials:
        """Return the runner of the trials: this machine, or a cluster."""
        if self._options.scheduler is None:
            return local_trials
        from kedge.search.dask_trials import Cluster

        return stack.enter_context(Cluster(self._options.scheduler, target, job))

    def _reference_latency(self, worker: Worker, job: Job) -> worker_messages.Latency:
        return worker.call(
            "kedge.evaluation.worker_tasks:reference_latency",
            worker_messages.ReferenceLatencyRequest(
                model=job.model.reference, inputs=job.model.inputs, data=job.evaluation, preprocess=job.preprocess
            ),
            worker_messages.Latency,
            deadline=self._options.deadline,
        )

    def _source(self, job: Job, data: _Inputs) -> ReleaseSource:
        return ReleaseSource(
            options=self._options,
            budget=job.budget,
            seed=job.seed,
            model=data.model,
            labels=data.pipeline.names or data.model.classes,
            calibration_digest=data.calibration_digest,
            evaluation_digest=data.evaluation_digest,
            evaluation_samples=data.evaluation.samples,
            reference=job.reference.result(),
            tools={} if data.imported is None else data.imported.tools,
            pipeline=data.pipeline.bundled,
            pipeline_files=data.pipeline.files,
        )


def _all_failed(failed: Sequence[Failed], kept: Path | None) -> KedgeError:
    """Return the error for a compilation without any bundle; it names the folder of the nearest models, if there are
    any."""
    if len(failed) == 1:
        error = failed[0].error
        if kept is None:
            return error
        where_it_lies = f"The nearest model lies in {kept}"
        remedy = where_it_lies if error.remedy is None else f"{error.remedy}. {where_it_lies}"
        return type(error)(error.what, where=error.where, remedy=remedy)
    each = "; ".join(f"{one.target.name}: {one.error}" for one in failed)
    together = None if kept is None else f"The nearest models lie in {kept}"
    return CompileError(f"no target could be compiled: {each}", remedy=together)

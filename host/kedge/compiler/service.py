"""The way through the compiler: check what came, run the float reference beside the first lowering, compile each
target, write the release."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from kedge.compiler import exchange, ladder, metric, pack, preprocessing, report
from kedge.compiler import model as modelling
from kedge.compiler.dataset import Data, Dataset, Scan
from kedge.compiler.golden import LEAST
from kedge.compiler.ladder import Compiled, Failed, Job, Tell
from kedge.compiler.model import Model
from kedge.compiler.options import CompileOptions
from kedge.compiler.release import Release
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.bundle.write import new_layout
from kedge_protocol.errors import (
    CompileError,
    ConfigError,
    DatasetError,
    KedgeError,
    MissingDependencyError,
    ModelError,
    StorageError,
    TargetError,
)
from kedge_protocol.topics import checked_name
from kedge_targets import target as targets
from kedge_targets.target import Target
from kedge_targets.worker import Worker

# What the extra brings and no backend looks for itself; ONNX Runtime is loaded in the worker, which says so.
_MODULES = ("onnx", "jinja2", "rich")
_MEMORY_SHARE = 0.8


def run(model: Path, options: CompileOptions, *, tell: Tell | None = None) -> Release:
    """Compile; see :func:`kedge.compile`.

    Args:
        tell: hears of progress, from several threads.
    """
    check_environment()
    asked = _targets(options)
    labels = _labels(options.labels)
    _check(model, options)
    with _scratch(options.out) as scratch:
        compilation = _Compilation(model, options, labels, scratch, tell or _silent)
        return compilation.run(asked)


def check_environment() -> None:
    """Raises :class:`MissingDependencyError` where this Python or this installation cannot compile."""
    if sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        raise MissingDependencyError(
            f"compiling needs Python 3.11 or newer, this is {version}",
            remedy="Devices and controllers run on 3.10; compile on a machine with a newer Python",
        )
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"compiling needs {', '.join(missing)}", remedy="Install it: pip install 'kedge[compile]'"
        )


def _silent(who: str, what: str, done: int, total: int) -> None:
    """Progress that nobody hears."""


def _targets(options: CompileOptions) -> list[Target]:
    if not options.targets:
        raise TargetError("no target is given", remedy=f"Known are {', '.join(targets.names())}")
    found = [targets.find(name) for name in options.targets]
    names = [target.name for target in found]
    for name in names:
        if names.count(name) > 1:
            raise TargetError(f"{name!r} is given twice")
    return found


def _labels(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {error}", where=f"--labels {path}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError("holds no name", where=f"--labels {path}", remedy="Write one class name on each line")
    return names


def _check(model: Path, options: CompileOptions) -> None:
    checked_name(options.name, "model name")
    checked_name(options.version, "version")
    if not model.is_file():
        raise ModelError("there is no such file", where=str(model))
    if not (math.isfinite(options.max_drop) and options.max_drop >= 0):
        raise ConfigError(f"{options.max_drop} is no drop", where="--max-drop", remedy="Give a number from 0 up")
    if not options.deadline > 0:
        raise ConfigError(f"{options.deadline} is no time", where="--deadline", remedy="Give seconds")
    if options.memory_limit is not None and options.memory_limit <= 0:
        raise ConfigError(f"{options.memory_limit} is no memory", where="--memory-limit", remedy="Give MiB")
    if options.metric is not None:
        metric.check_reference(options.metric)
    if options.out.exists() and not options.force:
        raise StorageError("exists already", where=str(options.out), remedy="Choose another folder, or give --force")


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A working folder beside OUT: the same file system, and no surprise in a small /tmp."""
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
class _Given:
    """The user's data, checked."""

    model: Model
    calibration: Data
    evaluation: Data
    calibration_digest: str
    evaluation_digest: str
    warnings: list[str]


class _Compilation:
    """One run; its threads and workers live as long as :meth:`run`."""

    def __init__(
        self, model: Path, options: CompileOptions, labels: tuple[str, ...], scratch: Path, tell: Tell
    ) -> None:
        self._path = model
        self._options = options
        self._labels = labels
        self._scratch = scratch
        self._tell = tell
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def run(self, asked: list[Target]) -> Release:
        # The threads outlive the workers: a worker's child dies with the thread that started it.
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(max_workers=2))
            floating = stack.enter_context(self._worker("reference"))
            first = stack.enter_context(self._worker(asked[0].name))
            # Whatever ends this, nobody waits for what the workers are at.
            stack.callback(first.stop)
            stack.callback(floating.stop)
            warmed = pool.submit(self._warm, first, asked[0])
            given = self._read(pool.submit(self._prepare, floating))
            warmed.result()
            preprocess = preprocessing.parse(self._options.preprocess, given.model.inputs)
            job = Job(
                options=self._options,
                model=given.model,
                calibration=given.calibration,
                evaluation=given.evaluation,
                preprocess=preprocess,
                reference=pool.submit(self._reference, floating, given, preprocess),
                scratch=self._scratch,
                tell=self._tell,
            )
            results = []
            for target in asked:
                worker = first if target is asked[0] else stack.enter_context(self._worker(target.name))
                results.append(self._one(target, job, worker))
                pool.submit(worker.close)  # its end is not waited for
            compiled = [result for result in results if isinstance(result, Compiled)]
            failed = [result for result in results if isinstance(result, Failed)]
            if not compiled:
                raise _all_failed(failed)
            latency = self._reference_latency(floating, job)
            pool.submit(floating.close)
            return self._write(job, given, compiled, failed, latency)

    def _worker(self, name: str) -> Worker:
        limit = self._options.memory_limit
        if limit is not None:
            allowed = limit << 20
        else:
            allowed = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _MEMORY_SHARE)
        return Worker(name=name, memory_limit=allowed)

    def _warm(self, worker: Worker, target: Target) -> None:
        worker.call(
            "kedge.compiler.tasks:warm",
            exchange.WarmRequest(backend=target.backends[0].name),
            exchange.Done,
            deadline=self._options.deadline,
        )

    def _prepare(self, worker: Worker) -> Model:
        return worker.call(
            "kedge.compiler.model:prepare",
            modelling.PrepareRequest(model=str(self._path.absolute()), graph=str(self._scratch / "graph.onnx")),
            Model,
            deadline=self._options.deadline,
        )

    def _read(self, prepared: Future[Model]) -> _Given:
        """Both data sets while the worker reads the model."""
        began = time.perf_counter()
        try:
            calibration, calibration_scan = self._dataset("calibration", self._options.calibration)
            evaluation, evaluation_scan = self._dataset("evaluation", self._options.evaluation)
        except KedgeError:
            prepared.result()  # what is wrong with the model is said first
            raise
        model = prepared.result()
        given = _Given(
            model=model,
            calibration=calibration.bind(model.inputs),
            evaluation=evaluation.bind(model.inputs),
            calibration_digest=calibration_scan.digest(calibration.names),
            evaluation_digest=evaluation_scan.digest(evaluation.names),
            warnings=_shared(calibration_scan, evaluation_scan),
        )
        if given.evaluation.samples < LEAST:
            raise DatasetError(
                f"has {given.evaluation.samples} samples, at least {LEAST} are needed",
                where=evaluation.where,
                remedy="Golden vectors are taken from it",
            )
        if self._labels and model.outputs[0].shape and model.outputs[0].shape[-1] not in (None, len(self._labels)):
            raise ConfigError(
                f"holds {len(self._labels)} names, output {model.outputs[0].name!r} has {model.outputs[0].shape[-1]}",
                where=f"--labels {self._options.labels}",
            )
        self._seconds["read"] = time.perf_counter() - began
        return given

    def _dataset(self, role: str, path: Path) -> tuple[Dataset, Scan]:
        self._tell("data", role, 0, 0)
        scratch = self._scratch / role
        scratch.mkdir()
        dataset = Dataset(path, scratch, role=role)
        return dataset, dataset.scan()

    def _reference(self, worker: Worker, given: _Given, preprocess: dict[str, Preprocess]) -> exchange.ReferenceAnswer:
        user = self._options.metric
        answer = worker.call(
            "kedge.compiler.tasks:reference",
            exchange.ReferenceRequest(
                model=given.model.graph,
                inputs=given.model.inputs,
                outputs=given.model.outputs,
                data=given.evaluation,
                preprocess=preprocess,
                user_metric=None if user is None else metric.absolute(user),
                batch=1 if given.model.fixed_batch else given.model.batch,
                folder=str(self._scratch / "reference"),
            ),
            exchange.ReferenceAnswer,
            deadline=self._options.deadline,
            on_progress=lambda what, done, total: self._tell("reference", "evaluate", done, total),
        )
        self._seconds["reference"] = answer.seconds
        return answer

    def _one(self, target: Target, job: Job, worker: Worker) -> Compiled | Failed:
        began = time.perf_counter()
        result = ladder.compile_target(target, job, worker)
        self._seconds[f"target {target.name}"] = time.perf_counter() - began
        self._tell(target.name, "done" if isinstance(result, Compiled) else "failed", 1, 1)
        return result

    def _reference_latency(self, worker: Worker, job: Job) -> exchange.Latency:
        return worker.call(
            "kedge.compiler.tasks:reference_latency",
            exchange.ReferenceLatencyRequest(
                model=job.model.graph, inputs=job.model.inputs, data=job.evaluation, preprocess=job.preprocess
            ),
            exchange.Latency,
            deadline=self._options.deadline,
        )

    def _write(
        self, job: Job, given: _Given, compiled: list[Compiled], failed: list[Failed], latency: exchange.Latency
    ) -> Release:
        began = time.perf_counter()
        options, reference = self._options, job.reference.result()
        source = pack.Source(
            options=options,
            model=given.model,
            labels=self._labels,
            calibration_digest=given.calibration_digest,
            evaluation_digest=given.evaluation_digest,
            evaluation_samples=given.evaluation.samples,
            reference=reference,
        )
        with new_layout(options.out, replace=options.force) as writer:
            digests = [pack.add(writer, one, source).digest for one in compiled]
            writer.add_release(options.name, options.version)
            self._seconds["pack"] = time.perf_counter() - began
            self._seconds["total"] = time.perf_counter() - self._began
            told = report.of(self._path.name, source, compiled, digests, failed, latency, given.warnings, self._seconds)
            report.write(told, writer.path)
        return replace(Release.open(options.out), failures={one.target.name: one.error for one in failed})


def _shared(calibration: Scan, evaluation: Scan) -> list[str]:
    shared = calibration.shared_with(evaluation)
    if not shared:
        return []
    return [
        f"{shared} of {len(evaluation.rows)} evaluation samples are among the calibration samples: "
        "the measured drop is too good"
    ]


def _all_failed(failed: Sequence[Failed]) -> KedgeError:
    if len(failed) == 1:
        return failed[0].error
    each = "; ".join(f"{one.target.name}: {one.error}" for one in failed)
    return CompileError(f"no target could be compiled: {each}")

"""Trials on a Dask cluster, for a sweep that outgrows one machine.

Everything that a trial needs is sent with it: the graph, both data sets, the float model's outputs, the user's own
functions. Each file is sent to a cluster once, named by its digest. A trial on the cluster runs the same code as a
local one (:mod:`kedge.search.trial`), in its own child process of a Dask worker; its files are sent back. Latencies are
measured where the compilation was started, so the result does not depend on where a trial ran.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from kedge.evaluation import worker_messages
from kedge.evaluation.dataset import Data
from kedge.evaluation.model import Model
from kedge.search import trial
from kedge.search.budget import Budget
from kedge.search.candidate import Candidate
from kedge.search.latency import LatencyLog
from kedge.search.options import CompileOptions
from kedge.search.results import Attempt, Job, Outcome
from kedge_protocol import __version__, codec, digest, errors
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import ConfigError, KedgeError, MissingDependencyError, WorkerError
from kedge_protocol.packages import pip_install
from kedge_targets.numerics import Plan
from kedge_targets.target import Target
from kedge_targets.worker import Worker

_CONNECT_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class RemoteTrial:
    """A trial as it is sent; paths are those of the sending machine."""

    version: str
    candidate: Candidate
    target: Target
    options: CompileOptions
    budget: Budget
    model: Model
    calibration: Data
    evaluation: Data
    preprocess: dict[str, Preprocess]
    reference: worker_messages.ReferenceAnswer
    seed: int


@dataclass(frozen=True, kw_only=True)
class RemoteFailure:
    """A Kedge error as it is sent."""

    kind: str
    what: str
    where: str | None = None
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True)
class RemoteAnswer:
    """The answer of a trial, apart from its files (title → bytes)."""

    attempt: Attempt
    plan: Plan
    lowered: worker_messages.LowerAnswer | None = None
    evaluation: worker_messages.EvaluateAnswer | None = None
    failure: RemoteFailure | None = None


class Cluster:
    """Runs candidates on the cluster of a scheduler; see :class:`kedge.search.local_trials.Trials`.

    Args:
        address: ``tcp://HOST:PORT``.

    Raises:
        MissingDependencyError: Dask is not installed.
        ConfigError: no scheduler answers at the address, or it has no workers.
    """

    def __init__(self, address: str, target: Target, job: Job) -> None:
        self._address = address
        self._target = target
        self._job = job
        self._client: Any = None
        self._sent: dict[str, Any] = {}

    def __enter__(self) -> Cluster:
        try:
            from distributed import Client
        except ImportError as error:
            raise MissingDependencyError(
                "--scheduler needs Dask", remedy=f"Install it: {pip_install('cluster')}"
            ) from error
        where = f"--scheduler {self._address}"
        try:
            self._client = Client(self._address, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError, TimeoutError) as error:
            raise ConfigError(
                f"no Dask scheduler answers: {error}", where=where, remedy="Start one with `dask scheduler`"
            ) from error
        if not self._client.scheduler_info()["workers"]:
            self._client.close()
            raise ConfigError("the scheduler has no workers", where=where, remedy="Start some with `dask worker`")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def run(self, candidates: Sequence[Candidate], folders: Sequence[Path]) -> list[Outcome]:
        """Run candidates; see :meth:`kedge.search.local_trials.Trials.run`.

        Raises:
            WorkerError: the cluster lost a trial.
        """
        job = self._job
        reference = job.reference.result()
        waiting = []
        for candidate in candidates:
            request = RemoteTrial(
                version=__version__,
                candidate=candidate,
                target=self._target,
                options=replace(job.options, checkpoints=None, scheduler=None),
                budget=job.budget,
                model=job.model,
                calibration=job.calibration,
                evaluation=job.evaluation,
                preprocess=job.preprocess,
                reference=reference,
                seed=job.seed,
            )
            paths = _files(job, reference)
            blobs = {path: self._scattered(path) for path in paths}
            waiting.append(self._client.submit(remote, codec.encode(request), blobs, pure=False))
        try:
            answers = self._client.gather(waiting)
        except Exception as error:  # whatever the cluster itself raises
            raise WorkerError(
                f"the cluster lost a trial: {type(error).__name__}: {error}",
                where=f"--scheduler {self._address}",
                remedy="Look at the logs of its workers",
            ) from error
        return [
            _outcome(candidate, folder, raw, files)
            for candidate, folder, (raw, files) in zip(candidates, folders, answers, strict=True)
        ]

    def _scattered(self, path: str) -> Any:
        """Return a file's bytes on the cluster, sent only once."""
        name = digest.of_file(Path(path))
        if name not in self._sent:
            self._sent[name] = self._client.scatter(Path(path).read_bytes(), broadcast=False)
        return self._sent[name]


def _files(job: Job, reference: worker_messages.ReferenceAnswer) -> list[str]:
    """Return all files that a trial reads."""
    found = [job.model.graph, job.model.reference, *reference.outputs.values()]
    for data in (job.calibration, job.evaluation):
        found += [*data.arrays.values(), *data.shapes.values(), *([] if data.label is None else [data.label])]
    for function in (reference.choice.function, job.options.loss_function):
        if function is not None:
            found.append(function.rpartition(":")[0])
    if job.options.bitfile is not None:
        bitfile = job.options.bitfile.absolute()
        found += [str(one) for one in (bitfile, bitfile.with_suffix(".hwh")) if one.is_file()]
    return list(dict.fromkeys(found))


def remote(raw: bytes, blobs: Mapping[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
    """Run one trial on a machine of the cluster.

    Args:
        raw: an encoded :class:`RemoteTrial`.
        blobs: path on the sending machine → content.

    Returns:
        An encoded :class:`RemoteAnswer`, and the lowered files by title.
    """
    with tempfile.TemporaryDirectory(prefix="kedge-trial-") as scratch:
        folder = Path(scratch)
        places = {path: str(_placed(folder, path, content)) for path, content in blobs.items()}
        request = codec.decode(
            codec.encode(_moved(codec.loads(raw, where="parcel"), places)), RemoteTrial, where="parcel"
        )
        if request.version != __version__:
            return _refused(request), {}
        reference: Future[worker_messages.ReferenceAnswer] = Future()
        reference.set_result(request.reference)
        job = Job(
            options=request.options,
            budget=request.budget,
            model=request.model,
            calibration=request.calibration,
            evaluation=request.evaluation,
            preprocess=request.preprocess,
            reference=reference,
            record=LatencyLog(),
            seed=request.seed,
            scratch=folder / "scratch",
            on_progress=_nobody,
        )
        with Worker(name=f"trial-{request.candidate.key}") as worker:
            outcome = trial.run(request.candidate, request.target, job, worker.call, folder / "trial")
        files = {}
        if outcome.lowered is not None:
            files = {title: Path(path).read_bytes() for title, path in outcome.lowered.files.items()}
        answer = RemoteAnswer(
            attempt=outcome.attempt,
            plan=outcome.plan,
            lowered=outcome.lowered,
            evaluation=outcome.evaluation,
            failure=None if outcome.error is None else _failure(outcome.error),
        )
        return codec.encode(answer), files


def _nobody(who: str, what: str, done: int, total: int) -> None:
    """Ignore progress: it is not sent back from the cluster."""


def _placed(folder: Path, path: str, content: bytes) -> Path:
    """Write a file under its own name; files of the same folder stay together."""
    parent = digest.hex_of(digest.of_bytes(str(Path(path).parent).encode()))
    place = folder / "files" / parent[:16] / Path(path).name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    return place


def _moved(plain: Any, places: Mapping[str, str]) -> Any:
    """Return the same data with each path replaced by its new one, also in ``path:function``."""
    if isinstance(plain, dict):
        return {name: _moved(value, places) for name, value in plain.items()}
    if isinstance(plain, list):
        return [_moved(value, places) for value in plain]
    if isinstance(plain, str):
        if plain in places:
            return places[plain]
        path, colon, name = plain.rpartition(":")
        if colon and path in places:
            return f"{places[path]}:{name}"
    return plain


def _failure(error: KedgeError) -> RemoteFailure:
    return RemoteFailure(kind=type(error).__name__, what=error.what, where=error.where, remedy=error.remedy)


def _refused(request: RemoteTrial) -> bytes:
    attempt = Attempt(backend=request.candidate.backend.name, precision=request.candidate.plan.default.value)
    failure = RemoteFailure(
        kind="ConfigError",
        what=f"a worker of the cluster has Kedge {__version__}, this is {request.version}",
        remedy="Install the same version everywhere",
    )
    return codec.encode(RemoteAnswer(attempt=attempt, plan=request.candidate.plan, failure=failure))


def _outcome(candidate: Candidate, folder: Path, raw: bytes, files: Mapping[str, bytes]) -> Outcome:
    """Return the outcome, with the files written where a local trial would have written them."""
    answer = codec.decode(raw, RemoteAnswer, where="answer of the cluster")
    attempt = answer.attempt
    outcome = Outcome(candidate=candidate, attempt=attempt, plan=answer.plan, folder=folder)
    if answer.failure is not None:
        made: Callable[..., KedgeError] = getattr(errors, answer.failure.kind, KedgeError)
        outcome.error = made(answer.failure.what, where=answer.failure.where, remedy=answer.failure.remedy)
        attempt.reason = str(outcome.error)
        return outcome
    lowered = answer.lowered
    if lowered is not None:
        (folder / "files").mkdir(parents=True)
        for title, content in files.items():
            (folder / "files" / title).write_bytes(content)
        lowered = replace(lowered, files={title: str(folder / "files" / title) for title in files})
        with contextlib.suppress(FileExistsError):
            outcome.program = trial.program(candidate.backend.name, lowered, folder / "packed")
    outcome.lowered, outcome.evaluation = lowered, answer.evaluation
    return outcome

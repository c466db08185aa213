"""Measures layer sensitivity once, in the background, in the worker of the float reference."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from kedge.quantization.sensitivity import Sensitivity
from kedge.search.effort import Effort
from kedge.search.results import Job
from kedge.search.worker_messages import SensitivityRequest
from kedge_protocol.errors import KedgeError
from kedge_targets import registry
from kedge_targets.numerics import Family, Precision, QuantizationScheme
from kedge_targets.target import Target
from kedge_targets.worker import Worker


class SensitivityJob:
    """Layer sensitivity, measured in the background. Calling the job waits for the result; None if there is none.

    Args:
        worker: that of the float reference, used after the reference is done.
    """

    def __init__(self, job: Job, targets: Sequence[Target], worker: Worker, pool: ThreadPoolExecutor) -> None:
        self._job = job
        self._worker = worker
        self._pool = pool
        self._future: Future[Sensitivity | None] | None = None
        self._precisions, self._scheme = _asked(targets, job.options.effort)
        self.warnings: list[str] = []

    def start(self) -> None:
        """Start the measurement if it has not started and there is anything to measure."""
        if self._future is None:
            self._future = self._pool.submit(self._measured)

    def __call__(self) -> Sensitivity | None:
        """Wait for the result."""
        self.start()
        return None if self._future is None else self._future.result()

    @property
    def found(self) -> Sensitivity | None:
        """Return the result if the measurement was ever started."""
        return None if self._future is None else self._future.result()

    def _measured(self) -> Sensitivity | None:
        job = self._job
        if not self._precisions or job.model.quantized or not job.calibration.samples:
            return None
        choice = job.reference.result().choice
        effort = job.options.effort if job.options.effort is not Effort.QUICK else Effort.NORMAL
        try:
            return self._worker.call(
                "kedge.search.worker_tasks:sensitivity",
                SensitivityRequest(
                    graph=job.model.graph,
                    inputs=job.model.inputs,
                    calibration=job.calibration,
                    preprocess=job.preprocess,
                    precisions=self._precisions,
                    quantized=self._scheme,
                    samples=effort.sensitivity_samples,
                    seconds=max(1.0, min(effort.sensitivity_seconds, job.clock.left)),
                    choice=choice,
                ),
                Sensitivity,
                deadline=job.options.deadline,
                on_progress=lambda what, done, total: job.on_progress("sensitivity", what, done, total),
            )
        except KedgeError as error:
            # A report without it is better than none.
            self.warnings.append(f"the layers' sensitivity could not be measured: {str(error).splitlines()[0]}")
            return None


def _asked(targets: Sequence[Target], effort: Effort) -> tuple[tuple[Precision, ...], QuantizationScheme | None]:
    """Return the precisions to measure: the backends' usual low-bit ones; with high effort all quantized ones."""
    precisions: set[Precision] = set()
    scheme: QuantizationScheme | None = None
    for target in targets:
        for choice in target.backends[:1]:
            compiler = registry.compiler(choice.name)
            precisions |= {one for one in compiler.numerics.precisions if one.quantized}
            schemes = compiler.quantized_for(target)
            scheme = scheme or (schemes[0] if schemes else None)
    if effort is not Effort.HIGH:
        usual = {Family.STATIC, Family.FABRIC}
        precisions = {one for one in precisions if one.family in usual and one not in (Precision.W2A2, Precision.W3A3)}
    return tuple(one for one in Precision if one in precisions), scheme

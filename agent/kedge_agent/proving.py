"""Proving a bundle on this device: what is built and measured for it here, and its golden vectors, in a worker."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_agent.slots import CONFIG_FILE, ModelFolder
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.errors import KedgeError, VerificationError
from kedge_protocol.messages import Latency

if TYPE_CHECKING:
    from kedge_targets.pipeline.others import Neighbour

log = logging.getLogger(__name__)

_TUNE_SECONDS = 60.0
"""Seconds that comparing ways of running calls may take; it begins nothing new after a tenth of them."""


@dataclass(frozen=True, kw_only=True)
class ProofLimits:
    """Resource limits of the worker that runs golden vectors.

    Attributes:
        deadline: seconds, including the worker's start.
        prepare_deadline: seconds for what the backend builds on the device before the golden vectors.
        memory_bytes: memory limit; None for no limit.
    """

    deadline: float = 120.0
    prepare_deadline: float = 3600.0
    memory_bytes: int | None = None


@dataclass(frozen=True)
class Proof:
    """The result of a successful proof.

    Attributes:
        detail: description of what ran the vectors; None if the runtime's name says it all.
        p50_ms, p95_ms: milliseconds of one call; None if none was timed.
        calls: number of timed calls.
    """

    detail: str | None = None
    p50_ms: float | None = None
    p95_ms: float | None = None
    calls: int = 0

    def latency(self, bundle: Bundle) -> Latency | None:
        """Return the latency as reported for this bundle."""
        entry = bundle.config.entry
        files = next((layer.digest for layer in bundle.manifest.layers if layer.title == entry), None)
        if self.p50_ms is None or self.p95_ms is None or files is None:
            return None
        return Latency(bundle=bundle.digest, files=files, p50_ms=self.p50_ms, p95_ms=self.p95_ms, calls=self.calls)


def prove(
    folder: Path, config: BundleConfig, limits: ProofLimits, cache: Path | None, on_progress: Callable[[str], None]
) -> Proof:
    """Let the backend build what it needs on this device, choose how calls are run here, then run a slot's golden
    vectors that way, all in the worker.

    Args:
        cache: folder for what is built; None for the user's own.
        on_progress: called with descriptions of the progress.

    Raises:
        VerificationError: the golden vectors do not match.
        KedgeError: the worker crashes or exceeds its limits, or the runtime refuses the file.
    """
    from kedge_targets.calls.plan import TUNE, TuneAnswer
    from kedge_targets.proof import PREPARE, PROVE, PrepareAnswer, ProveAnswer, ProveRequest
    from kedge_targets.worker import Worker

    def progress(what: str, done: int, total: int) -> None:
        on_progress(f"{what}, {done} of {total}" if total else what)

    request = ProveRequest(
        folder=str(folder),
        config=str(folder / CONFIG_FILE),
        cache=None if cache is None else str(cache),
        others=others_of(folder, config),
    )
    with Worker(name=f"prove-{config.name}", memory_limit=limits.memory_bytes) as worker:
        worker.call(PREPARE, request, PrepareAnswer, deadline=limits.prepare_deadline, on_progress=progress)
        try:
            worker.call(TUNE, request, TuneAnswer, deadline=min(limits.deadline, _TUNE_SECONDS), on_progress=progress)
        except KedgeError as error:
            # The proof says whether the bundle is to blame; without a plan its calls run as it says itself.
            log.info("%s: how its calls are run could not be compared: %s", config.name, error)
        answer = worker.call(PROVE, request, ProveAnswer, deadline=limits.deadline)
    if not answer.holds:
        raise VerificationError(answer.reason)
    if answer.timing is None:
        return Proof(answer.detail or None)
    return Proof(answer.detail or None, answer.timing.p50_ms, answer.timing.p95_ms, answer.timing.calls)


def others_of(folder: Path, config: BundleConfig) -> dict[str, Neighbour]:
    """Return the installed bundles to which a bundle's pipeline goes on.

    Args:
        folder: the bundle's slot, ``STATE/models/NAME/slots/HEX``.
    """
    if config.pipeline is None or config.pipeline.then is None:
        return {}
    from kedge_targets.pipeline.others import Neighbour, names

    found = {}
    for name in names(config.pipeline):
        slot = ModelFolder(folder.parents[3], name).current()
        if slot is not None:
            found[name] = Neighbour(folder=str(slot.folder), config=str(slot.folder / CONFIG_FILE), digest=slot.digest)
    return found


Prover = Callable[[Path, BundleConfig, ProofLimits, "Path | None", Callable[[str], None]], Proof]
"""See :func:`prove`."""

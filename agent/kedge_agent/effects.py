"""Performs the update machine's actions on a real disk with a real worker.

Writing a block, requesting and reporting happen immediately, in the caller's thread. All other disk work happens in one
thread, in order; the golden vectors run in another, so that a slow model does not delay the others.
"""

from __future__ import annotations

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from kedge_agent import counters, served_endpoint
from kedge_agent.proving import ProofLimits, Prover, prove
from kedge_agent.room import Room
from kedge_agent.runtimes import installed_runtimes
from kedge_agent.slots import ModelFolder, model_folders
from kedge_agent.store import Store
from kedge_agent.update import actions, events
from kedge_protocol.errors import BundleError, KedgeError, StorageError, VerificationError

log = logging.getLogger(__name__)

_PROGRESS_SECONDS = 2.0
"""Seconds between two progress reports of a proof."""


def installed_of(folder: ModelFolder) -> events.Installed:
    """Return what the slots of one model hold."""
    current, previous = folder.current(), folder.previous()
    version = None
    if current is not None:
        try:
            version = current.bundle().config.version
        except (OSError, BundleError) as error:
            log.warning("the slot of %s is damaged: %s", folder.name, error)
            return events.Installed(None, None, previous.digest if previous else None)
    return events.Installed(current.digest if current else None, version, previous.digest if previous else None)


def foreign(error: Exception) -> str:
    """Describe an error; one outside Kedge's error tree begins with its type."""
    return str(error) if isinstance(error, KedgeError) else f"{type(error).__name__}: {error}"


Knock = Callable[[ModelFolder, str], int]
"""Sends the golden samples of a model's current bundle, which must have this digest, through the served endpoint; see
:func:`kedge_agent.served_endpoint.knock`."""


class Jobs(Protocol):
    """Runs jobs one after another."""

    def put(self, job: Callable[[], None]) -> None:
        """Queue ``job``."""

    def stop(self, patience: float) -> None:
        """Run no more jobs; wait up to ``patience`` seconds for the current one."""


class EffectRunner:
    """Performs actions and posts their outcomes.

    Args:
        store: the store of blobs.
        limits: limits of the golden vectors.
        post: called with each event, from any thread.
        ask: publishes a request.
        report: called when the reported state has changed.
        remember: writes the machine's persistent state.
        prover: runs the golden vectors of a slot.
        shadow: starts and stops shadows.
        endpoint: sends golden samples through the served endpoint.
        room: what memory has room for; the device's by default.
        disk, proofs: run jobs one after another; threads by default.
    """

    def __init__(
        self,
        store: Store,
        limits: ProofLimits,
        *,
        post: Callable[[events.Event], None],
        ask: Callable[[actions.RequestBlocks], None],
        report: Callable[[], None],
        remember: Callable[[actions.PersistentState], None],
        prover: Prover = prove,
        shadow: Callable[[actions.StartShadow | actions.StopShadow], None] = lambda _: None,
        endpoint: Knock = served_endpoint.knock,
        room: Room | None = None,
        disk: Jobs | None = None,
        proofs: Jobs | None = None,
    ) -> None:
        self._store = store
        self._limits = limits
        self._post = post
        self._ask = ask
        self._report = report
        self._remember = remember
        self._prover = prover
        self._shadow = shadow
        self._endpoint = endpoint
        self._room = room or Room(store.state)
        self._disk = disk or JobThread("disk")
        self._proofs = proofs or JobThread("proofs")
        self._on_disk: dict[type, Callable[[Any], events.Event | None]] = {
            actions.OpenBlob: self._open,
            actions.FinishBlob: self._finish,
            actions.StoreBlob: self._put,
            actions.CloseBlob: self._close,
            actions.Measure: self._measure,
            actions.Assemble: self._assemble,
            actions.Switch: self._switch,
            actions.RollBack: self._roll_back,
            actions.Remove: self._remove,
            actions.CollectGarbage: self._collect,
            actions.Remember: self._keep,
        }

    def run(self, wanted: list[actions.Action]) -> None:
        """Perform these actions in this order. Outcomes are posted later from another thread."""
        for action in wanted:
            if isinstance(action, actions.WriteBlock):
                self._write(action)
            elif isinstance(action, (actions.RequestBlocks, actions.Report)):
                self._say(action)
            elif isinstance(action, actions.Prove):
                self._proofs.put(functools.partial(self._prove, action))
            elif isinstance(action, (actions.StartShadow, actions.StopShadow)):
                self._shadow(action)
            elif isinstance(action, actions.AskEndpoint):
                self._proofs.put(functools.partial(self._knock, action))
            else:
                self._disk.put(functools.partial(self._do, action))

    def close(self) -> None:
        """Stop the threads after the current job; a running proof ends with the process."""
        self._proofs.stop(0.0)
        self._disk.stop(5.0)

    def _say(self, action: actions.RequestBlocks | actions.Report) -> None:
        try:
            if isinstance(action, actions.RequestBlocks):
                self._ask(action)
            else:
                self._report()
        except Exception:
            # The actions after it are done all the same; requests and reports are made again.
            log.exception("%s failed", type(action).__name__)

    def _do(self, action: actions.Action) -> None:
        try:
            outcome = self._on_disk[type(action)](action)
        except Exception as error:
            # Whatever it was: the machine waits for an outcome.
            if not isinstance(error, KedgeError):
                log.exception("%s failed", type(action).__name__)
            outcome = _failed(action, foreign(error))
        if outcome is not None:
            self._post(outcome)

    def _write(self, action: actions.WriteBlock) -> None:
        try:
            self._store.write(action.digest, action.index, action.payload)
        except Exception as error:  # noqa: BLE001 -- it becomes the download's failure
            words = (isinstance(error, OSError) and error.strerror) or foreign(error)
            reason = f"block {action.index} of {action.digest} cannot be written: {words}"
            log.error("%s", reason)
            # What was written is given back at once: a full disk hurts everybody on the device.
            self._disk.put(lambda: self._give_back(action.digest, reason))

    def _give_back(self, digest_: str, reason: str) -> None:
        try:
            self._store.close(digest_, drop=True)
        finally:
            self._post(events.WriteFailed(digest_, reason))

    def _open(self, action: actions.OpenBlob) -> events.Event:
        return self._store.open(
            action.digest,
            action.size,
            map_digest=action.map_digest,
            block_map=action.block_map,
            read=action.read,
        )

    def _finish(self, action: actions.FinishBlob) -> events.Event:
        self._store.finish(action.digest)
        return events.BlobStored(action.digest)

    def _put(self, action: actions.StoreBlob) -> events.Event:
        self._store.put(action.digest, action.data)
        return events.BlobStored(action.digest)

    def _close(self, action: actions.CloseBlob) -> None:
        self._store.close(action.digest)

    def _measure(self, action: actions.Measure) -> events.Event:
        bundle = action.bundle
        return events.Measured(
            model=action.model,
            digest=bundle.digest,
            missing_bytes=self._store.missing_bytes(bundle),
            free_bytes=self._store.free_bytes(),
            memory_bytes=self._room.total(),
            runtimes=installed_runtimes(tuple(need.distribution for need in bundle.config.runtimes)),
        )

    def _assemble(self, action: actions.Assemble) -> events.Event:
        self._folder(action.model).assemble(action.bundle, self._store.blob_path)
        return events.Assembled(action.model, action.bundle.digest)

    def _prove(self, action: actions.Prove) -> None:
        digest_ = action.bundle.digest
        told = 0.0

        def on_progress(detail: str) -> None:
            nonlocal told
            now = time.monotonic()
            if now - told >= _PROGRESS_SECONDS:
                told = now
                self._post(events.Proving(action.model, digest_, detail))

        self._post(events.Proving(action.model, digest_))
        folder = self._folder(action.model)
        try:
            self._room.make(folder, action.bundle.config, on_progress, beside=action.beside)
            slot = folder.slot(digest_)
            proof = self._prover(slot.folder, action.bundle.config, self._limits, folder.cache, on_progress)
        except Exception as failure:
            if not isinstance(failure, KedgeError):
                log.exception("the proof of %s failed", digest_)
            self._post(events.Proved(action.model, digest_, foreign(failure)))
        else:
            self._post(events.Proved(action.model, digest_, None, proof.detail, proof.latency(action.bundle)))
        # After the switch, which is on its way: until then the old version is not loaded again.
        self._disk.put(folder.take_back)

    def _switch(self, action: actions.Switch) -> events.Event:
        folder = self._folder(action.model)
        before = counters.collect(folder.counters, fold=False).digests.get(action.bundle.digest, 0)
        return self._switched(folder, lambda: folder.switch(folder.slot(action.bundle.digest)), before)

    def _roll_back(self, action: actions.RollBack) -> events.Event:
        folder = self._folder(action.model)
        return self._switched(folder, folder.roll_back)

    def _remove(self, action: actions.Remove) -> events.Event:
        folder = self._folder(action.model)
        return self._switched(folder, folder.remove)

    def _knock(self, action: actions.AskEndpoint) -> None:
        samples, error, wrong = 0, None, False
        try:
            samples = self._endpoint(self._folder(action.model), action.digest)
        except Exception as failure:
            if not isinstance(failure, KedgeError):
                log.exception("the served endpoint of %s cannot be tried", action.model)
            error, wrong = foreign(failure), isinstance(failure, VerificationError)
        self._post(
            events.EndpointAnswered(
                model=action.model,
                digest=action.digest,
                attempt=action.attempt,
                samples=samples,
                error=error,
                wrong=wrong,
            )
        )

    @staticmethod
    def _switched(folder: ModelFolder, change: Callable[[], object], calls: int | None = None) -> events.Event:
        error = None
        try:
            change()
        except Exception as failure:
            if not isinstance(failure, KedgeError):
                log.exception("%s could not be switched", folder.name)
            error = foreign(failure)
        return events.Switched(folder.name, installed_of(folder), error, calls)

    def _collect(self, action: actions.CollectGarbage) -> None:
        keep = set(action.keep)
        for folder in model_folders(self._store.state):
            folder.prune(action.keep)
            for slot in (folder.current(), folder.previous()):
                if slot is None:
                    continue
                try:
                    bundle = slot.bundle()
                except (OSError, BundleError) as error:
                    # Better to keep too much than to lose what a slot may need.
                    log.warning("nothing is cleaned up: %s", error)
                    return
                keep |= {slot.digest, bundle.manifest.config.digest}
                keep |= {layer.digest for layer in bundle.manifest.layers}
        try:
            self._store.collect(keep)
        except OSError as error:
            log.warning("cleaning up failed: %s", error)

    def _keep(self, action: actions.Remember) -> None:
        try:
            self._remember(action.memory)
        except StorageError as error:
            log.error("the agent's memory cannot be written: %s", error)

    def _folder(self, model: str) -> ModelFolder:
        return ModelFolder(self._store.state, model)


def _failed(action: actions.Action, error: str) -> events.Event | None:
    """Return the outcome of an action that raised; None if nobody waits for it."""
    if isinstance(action, actions.OpenBlob):
        return events.BlobOpened(digest=action.digest, error=error)
    if isinstance(action, (actions.FinishBlob, actions.StoreBlob)):
        return events.BlobStored(action.digest, error)
    if isinstance(action, actions.Measure):
        return events.Measured(model=action.model, digest=action.bundle.digest, error=error)
    if isinstance(action, actions.Assemble):
        return events.Assembled(action.model, action.bundle.digest, error)
    if isinstance(action, (actions.Switch, actions.RollBack, actions.Remove)):
        return events.Switched(action.model, None, error)
    return None


class JobThread:
    """Runs jobs one after another in a thread."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def stop(self, patience: float) -> None:
        self._jobs.put(None)
        self._thread.join(patience)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # A job must not take the thread with it: everything after it would wait for ever.
                log.exception("a job failed")

"""The resident process of ``kedge-agent run``. It owns the only broker connection, the store, the update machine and
the serving process."""

from __future__ import annotations

import functools
import gc
import logging
import os
import platform
import secrets
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from kedge_agent import counters, malloc, persistent_state, served_endpoint, state_format, system
from kedge_agent.config import AgentConfig
from kedge_agent.effects import EffectRunner, installed_of
from kedge_agent.mqtt_link import Link
from kedge_agent.name_conflict import NameConflict
from kedge_agent.room import Room
from kedge_agent.runtimes import installed_runtimes
from kedge_agent.samples.runner import SampleRunner
from kedge_agent.serving.bundle_watch import ServingWatch
from kedge_agent.serving.supervisor import ServingSupervisor
from kedge_agent.shadow.runner import ShadowRunner
from kedge_agent.slots import ModelFolder, model_folders
from kedge_agent.split import settings as split_settings
from kedge_agent.store import Store
from kedge_agent.systemd import notify
from kedge_agent.telemetry import Meter
from kedge_agent.update import actions, events
from kedge_agent.update.desired_states import Identity
from kedge_agent.update.machine import Machine
from kedge_protocol import __version__
from kedge_protocol.errors import StorageError
from kedge_protocol.messages import ModelState, Reported, ReportedModel
from kedge_protocol.trust import Role

log = logging.getLogger(__name__)

TICK = 0.25
"""Seconds between two checks of the clock, the child and its messages."""
_COUNT_SECONDS = 1.0
"""Seconds between two counts of the calls of a bundle that nothing attests yet."""
FIRST_TELEMETRY = 1.0
_BOOTS_KEPT = 16


class Daemon:
    """One device's agent.

    Args:
        config: the checked configuration.
        clock: a monotonic clock, in seconds.

    Raises:
        StorageError: another agent uses the state folder, or it does not exist and cannot be created.
    """

    def __init__(self, config: AgentConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._stopping = threading.Event()
        malloc.one_arena()
        self._lock_handle, self._store = persistent_state.lock(config.state), Store(config.state)
        state_format.upgrade(config.state)
        before = persistent_state.read(config.state)
        self._boot_id = secrets.token_hex(6)
        self._boots, self._boot_ids = before.boots + 1, [*before.boot_ids, self._boot_id][-_BOOTS_KEPT:]
        self._memory = before.memory
        try:
            self._write_memory(before.memory)
        except StorageError as error:
            # A full disk is no reason to stay away: what is installed still serves.
            log.error("the agent's memory cannot be written: %s", error)
        self._seq, self._unheard_seconds = 0, 0.0
        self._busy = False
        self._problem: str | None = None
        self._told: dict[str, tuple[object, ...]] = {}
        self._runtimes = installed_runtimes(config.distributions)
        self._turn = threading.Lock()
        """Held while an event is handled and its actions are performed, in whatever thread it arrives."""
        self._machine = Machine(
            identity=Identity(device=config.name, target=config.target, trust=config.trust),
            boot_id=self._boot_id,
            memory=before.memory,
            installed=_installed(config.state),
            settings=config.update,
            seed=secrets.randbits(32),
            now=clock(),
        )
        self._conflict = NameConflict(self._boot_id, before.boot_ids)
        self._link = Link(
            config.broker,
            config.name,
            self._boot_id,
            post=self.post,
            command=self._command,
            conflict=self._conflict,
            noticed=self._report_anew,
            samples=lambda rid, size: self._samples.answered(rid, size),
        )
        self._shadows = ShadowRunner(config.state, config.shadow, post=self._shadow_ended)
        self._samples = _sample_runner(config, self._link, self._shadows)
        self._effects = EffectRunner(
            self._store,
            config.proof,
            post=self.post,
            ask=self._link.ask,
            report=self._report,
            remember=self._write_memory,
            shadow=self._shadows.apply,
            room=Room(config.state, config.memory_bytes),
            endpoint=functools.partial(served_endpoint.knock, endpoint=served_endpoint.endpoint_of(config)),
        )
        self._child = _serving_child(config)
        self._watch = ServingWatch(config.state, None if self._child is None else self._child.said)
        self._meter = Meter(config.state, self._boot_id, clock())
        self._telemetry_at, self._count_at = clock() + FIRST_TELEMETRY, clock()

    def run(self) -> None:
        """Run until SIGTERM, SIGINT or :meth:`stop`. Call it in the main thread."""
        self._write_split()
        self._watch.forget_all()
        for folder in model_folders(self._config.state):
            folder.forget_running()
        gc.freeze()
        malloc.give_back()
        with self._turn:
            self._effects.run(self._machine.start(self._clock()))
        self._link.start()
        log.info("agent %s: device %s, target %s, state %s", __version__, *self._who())
        if self._config.trust is None:
            log.warning("no keys are trusted ([trust] in agent.toml): who may write to the broker decides what runs")
        notify("READY=1")
        try:
            while not self._stopping.wait(TICK):
                try:
                    self._tick(self._clock())
                except Exception:
                    # What serves goes on. An error that stays is the watchdog's matter.
                    log.exception("a round failed")
                else:
                    notify("WATCHDOG=1")
        finally:
            notify("STOPPING=1")
            self._link.stop()
            if self._child is not None:
                self._child.stop()
            self._shadows.close()
            self._samples.close()
            self._effects.close()
            if self._lock_handle is not None:
                os.close(self._lock_handle)

    def stop(self) -> None:
        """End :meth:`run` soon. Any thread or signal handler may call it."""
        self._stopping.set()

    def catch_signals(self) -> None:
        """Make SIGTERM and SIGINT stop the agent cleanly."""

        def handler(number: int, _: FrameType | None) -> None:
            self.stop()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)

    def post(self, event: events.Event) -> None:
        """Pass an event to the update machine. Any thread may call it."""
        with self._turn:
            self._effects.run(self._machine.handle(event, self._clock()))

    def _who(self) -> tuple[str, str, str]:
        return self._config.name, self._config.target, str(self._config.state)

    def _tick(self, now: float) -> None:
        if self._child is not None and self._child.poll(now):
            self._watch.forget_all()
            self.post(events.ServingDied(self._child.last_words, self._child.died_serving))
        for event in self._watch.look():
            self.post(event)
        if now >= self._count_at:
            self._count_at = now + _COUNT_SECONDS
            self._count_calls()
        self.post(events.Tick())
        self._shadows.poll()
        self._see_to_samples(now)
        self._link.watch(now)
        if self._busy and self._machine.settled:
            malloc.give_back()
        self._busy = not self._machine.settled
        if self._config.telemetry_interval and now >= self._telemetry_at:
            self._telemetry_at = now + self._config.telemetry_interval
            self._send_telemetry(now)

    def _see_to_samples(self, now: float) -> None:
        with self._turn:
            desired = self._machine.desired_states.current
            ready = self._machine.controller_is_there
        if self._samples.poll(now, desired, ready=ready):
            self._report_anew()

    def _shadow_ended(self, event: events.Event) -> None:
        if isinstance(event, events.ShadowEnded):
            self._samples.shadow_ended(event)
        self.post(event)

    def _count_calls(self) -> None:
        """Tell the machine of the first calls of a bundle; later ones are counted with the telemetry."""
        with self._turn:
            waiting = self._machine.unattested()
        for name, digest in waiting.items():
            calls = counters.collect(ModelFolder(self._config.state, name).counters, fold=False).digests.get(digest, 0)
            self.post(events.Counted(name, digest, calls))

    def _send_telemetry(self, now: float) -> None:
        with self._turn:
            digests = {name: model.digest for name, model in self._machine.reported().items()}
            heard = self._machine.controller_is_there
        if not self._link.connection.connected:
            self._meter.fold(digests)  # the interval goes on until somebody can be told
            return
        child = self._child.pid if self._child is not None else None
        pids = [os.getpid()] if child is None else [os.getpid(), child]
        try:
            measured = self._meter.measure(
                digests, pids, self._store.free_bytes(), now, serving=child, shadow=self._shadows.take
            )
            self._unheard_seconds += 0.0 if heard else measured.interval
            self._link.telemetry(measured)
            for name, digest in digests.items():
                if digest is not None:
                    self.post(events.Counted(name, digest, self._meter.calls(name, digest)))
        except OSError as error:
            log.warning("no telemetry: %s", error)

    def _report(self) -> None:
        """Publish the reported state; the caller holds the lock."""
        self._seq += 1
        models = self._machine.reported()
        self._log(models)
        self._link.reported(
            Reported(
                boot_id=self._boot_id,
                seq=self._seq,
                target=self._config.target,
                agent_version=__version__,
                architecture=system.architecture(),
                python=platform.python_version(),
                runtimes=self._runtimes,
                free_bytes=self._free_bytes(),
                desired_version=self._machine.desired_version,
                models=models,
                endpoint=_endpoint(self._config),
                refused=self._machine.desired_states.refused,
                serving_restarts=self._machine.serving_restarts,
                namesake=self._conflict.boot,
                unheard_seconds=round(self._unheard_seconds, 1),
                trusted_keys=self._trusted_keys(),
                samples=self._samples.reported(),
                at=time.time(),
            )
        )

    def _trusted_keys(self) -> tuple[str, ...]:
        trust = self._machine.desired_states.trust
        return () if trust is None else tuple(key.id for role in Role for key in trust.keys(role))

    def _free_bytes(self) -> int:
        """Return the free bytes for the report, which must not fail because of them."""
        try:
            return self._store.free_bytes()
        except OSError as error:
            log.warning("the free space cannot be read: %s", error.strerror or error)
            return 0

    def _log(self, models: dict[str, ReportedModel]) -> None:
        """Log each change of a model's state, and each desired state that is refused."""
        problem = self._machine.desired_states.problem
        if problem is not None and problem != self._problem:
            log.warning("the desired state was not taken: %s", problem)
        self._problem = problem
        for name, model in models.items():
            waits = model.detail if model.state is ModelState.WAITING else None
            told = (model.state, model.desired, model.failure, waits)
            if self._told.get(name) == told:
                continue
            self._told[name] = told
            if model.failure is not None:
                failure = model.failure
                log.error("%s: %s failed at %s: %s", name, failure.digest[:19], failure.stage, failure.reason)
            else:
                level = logging.INFO if waits is None else logging.WARNING
                log.log(
                    level,
                    "%s: %s %s%s",
                    name,
                    model.state.value,
                    model.desired,
                    f" ({model.detail})" * bool(model.detail),
                )
        for name in self._told.keys() - models.keys():
            del self._told[name]
            log.info("%s: removed", name)

    def _command(self, verb: str) -> str | None:
        """Run a command; return None if it succeeds, else the reason."""
        if verb != "report":
            return f"unknown verb {verb!r}"
        self._report_anew()
        return None

    def _report_anew(self) -> None:
        with self._turn:
            self._report()

    def _write_split(self) -> None:
        """Leave word for the processes that load models."""
        try:
            split_settings.write(self._config.state, self._config.split)
        except StorageError as error:
            log.error("%s", error)

    def _write_memory(self, content: actions.PersistentState) -> None:
        self._memory = content
        persistent_state.write(
            self._config.state, persistent_state.AgentFile(boots=self._boots, boot_ids=self._boot_ids, memory=content)
        )


def _installed(state: Path) -> dict[str, events.Installed]:
    """Return the installed bundles by model, after each model's folder is repaired."""
    installed = {}
    for folder in model_folders(state):
        try:
            folder.bump()
            folder.prune()
        except OSError as error:
            log.error("%s cannot be written: %s", folder.path, error.strerror or error)
        installed[folder.name] = installed_of(folder)
    return installed


def _endpoint(config: AgentConfig) -> str | None:
    """Return the address at which clients reach this device's models."""
    scheme = "http" if config.server.tls_cert is None else "https"
    return None if config.listen is None else f"{scheme}://{config.listen}"


def _sample_runner(config: AgentConfig, link: Link, shadows: ShadowRunner) -> SampleRunner:
    signed = config.trust is not None
    return SampleRunner(config.state, config.samples, signed=signed, send=link.samples, shadow=shadows.apply)


def _serving_child(config: AgentConfig) -> ServingSupervisor | None:
    if config.listen is None:
        return None
    addresses = [config.listen, *([f"unix:{config.serve_socket}"] if config.serve_socket else ())]
    return ServingSupervisor(
        config.state,
        addresses,
        config.server,
        silence_seconds=config.hang_seconds,
        memory_bytes=config.serve_memory_bytes,
    )

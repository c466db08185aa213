"""One simulated device: the real update machine and the real link, a stand-in disk and a stand-in runtime."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace

from kedge.simulator.behaviour import Figures, SimulatedRuntime
from kedge.simulator.clock import Timer
from kedge.simulator.disk import MEMORY_BYTES, SimulatedDisk
from kedge.simulator.lies import Lie
from kedge.simulator.releases import BACKEND, RUNTIME
from kedge.simulator.scenario import MODEL, Defect
from kedge.simulator.surroundings import World
from kedge.simulator.traits import Traits
from kedge_agent.mqtt_link import Link
from kedge_agent.name_conflict import NameConflict
from kedge_agent.update import actions, events
from kedge_agent.update.desired_states import Identity
from kedge_agent.update.machine import Machine
from kedge_agent.update.settings import Settings
from kedge_protocol import __version__
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.messages import (
    Latency,
    ModelState,
    ModelTelemetry,
    Reported,
    ReportedModel,
    ShadowTelemetry,
    Telemetry,
)
from kedge_protocol.trust import Role

LOOK_SECONDS = (1.0, 20.0)
"""Between two looks of an update that is under way: the first, and the longest."""
REBOOT_SECONDS = (20.0, 90.0)
GOLDEN_SAMPLES = 8
_ENDPOINT_SECONDS = 0.2
_BOOTS_KEPT = 4


class SimulatedDevice:
    """One device.

    Args:
        world: where it lives.
        traits: what is particular about it.
    """

    def __init__(self, world: World, traits: Traits) -> None:
        self.traits = traits
        self.disk = SimulatedDisk(traits.free_bytes)
        self.running: str | None = None
        """Digest of the bundle that really answers calls."""
        self.reached: set[str] = set()
        """Bundles that it really switched to."""
        self.refused: set[str] = set()
        """Bundles that it refused."""
        self.measured = False
        """Whether it measured candidates."""
        self._really: Bundle | None = None
        self.link: Link | None = None
        self._world = world
        self._chance = random.Random(traits.seed)
        self._runtime = SimulatedRuntime(world.scenario.runtime, self._chance, world.noise, slow=traits.slow)
        self._boots: list[str] = []
        self._seq = self._telemetry_seq = 0
        self._totals = [0, 0]
        self._calls: Counter[str] = Counter()
        self._shadow: actions.StartShadow | None = None
        self._waiting: deque[events.Event] = deque()
        self._handling = self._changed = False
        self._look: Timer | None = None
        self._report_due: Timer | None = None
        self._looks = 0
        self._loaded: str | None = None
        self._measured_at = self._booted_at = 0.0
        self._told: tuple[object, ...] = ()
        self._began = 0

    def install(self, bundle: Bundle, maps: Mapping[str, bytes], desired: str) -> None:
        """Let a bundle serve, as if it had been rolled out before.

        Args:
            maps: the block maps of its files.
            desired: the signed desired state that asked for it.
        """
        trust = self._world.trust
        attested = {MODEL: actions.Attested(digest=bundle.digest, base=0, calls=1)}
        memory = actions.PersistentState(
            desired=desired, served={MODEL: bundle.digest}, attested=attested, pinned=trust, trusted=trust
        )
        self.disk.install(MODEL, bundle, maps, memory)
        self.running = bundle.digest
        self._really = bundle

    # Power.

    def start(self) -> None:
        """Switch it on."""
        world, traits = self._world, self.traits
        boot = f"{traits.name}-{world.run_id}{len(self._boots) + 1}"
        self._boots.append(boot)
        self._seq = self._telemetry_seq = 0
        self._look = self._report_due = self._shadow = None
        self._measured_at = self._booted_at = world.steady()
        self._runtime.restarted()
        self.machine = Machine(
            identity=Identity(device=traits.name, target=traits.target, trust=world.trust),
            boot_id=boot,
            memory=self.disk.memory,
            installed=self.disk.installed(),
            settings=Settings(),
            seed=self._chance.getrandbits(32),
            now=world.steady(),
        )
        self.link = Link(
            world.broker,
            traits.name,
            boot,
            post=self.post,
            command=self._command,
            conflict=NameConflict(boot, self._boots[-_BOOTS_KEPT:]),
            clock=self._wall,
            connect=world.connect(traits),
        )
        self._began = self.machine.desired_version
        self._load()
        self._take_effect(self.machine.start(world.steady()))
        self._drain()
        self.link.start()
        self._later(self._chance.random() * world.scenario.telemetry, self._send_telemetry)

    def reboot(self) -> None:
        """Take its power away for a while."""
        if self.link is None:
            return
        self._world.note(self.traits.name, "reboot", "")
        link, self.link = self.link, None
        self._boots[-1] += "!"
        self._world.lose(self.traits, link.connection, for_ever=True)
        self._waiting.clear()
        self._loaded = None
        self._world.later(self._chance.uniform(*REBOOT_SECONDS), self.start)

    def lose_network(self, *, for_ever: bool = False) -> None:
        """Cut its connection."""
        if self.link is not None:
            self._world.lose(self.traits, self.link.connection, for_ever=for_ever)

    def _later(self, seconds: float, function: Callable[[], None]) -> Timer:
        """Call a function later, unless the device boots meanwhile."""
        boot = self._boots[-1]

        def call() -> None:
            if self._boots[-1] == boot:
                function()

        return self._world.later(seconds, call)

    def _wall(self) -> float:
        world, traits = self._world, self.traits
        if traits.clock_lost:
            return world.steady() - self._booted_at
        return world.wall() + traits.clock_error(world.steady())

    # The update machine.

    def post(self, event: events.Event) -> None:
        """Pass an event to the update machine."""
        self._waiting.append(event)
        if not self._handling:
            self._drain()

    def _drain(self) -> None:
        self._handling = True
        try:
            while self._waiting:
                event = self._waiting.popleft()
                self._take_effect(self.machine.handle(event, self._world.steady()))
                if type(event) is events.DesiredArrived:
                    self._fall_silent()
        finally:
            self._handling = False
        if self._changed:
            self._report_soon()
        self._look_again()

    def _report_soon(self) -> None:
        within = self._world.scenario.reports
        if not within:
            self._changed = False
            self._report()
        elif self._report_due is None:
            self._report_due = self._later(within, self._report_now)

    def _report_now(self) -> None:
        self._report_due = None
        self._changed = False
        self._report()

    def _fall_silent(self) -> None:
        if self.traits.silent and self.machine.desired_version > self._began:
            self._world.note(self.traits.name, "silent", "")
            self.lose_network(for_ever=True)

    def _look_again(self) -> None:
        """See to it that an update under way goes on by itself."""
        if self.machine.settled and not self.machine.unattested():
            self._looks = 0
        elif self._look is None:
            first, last = LOOK_SECONDS
            seconds = first * 2.0**self._looks
            self._look = self._later(min(last, seconds), self._look_now)
            # A device that is cut off for days looks often; the power of two must stay a number.
            self._looks += seconds < last

    def _look_now(self) -> None:
        self._look = None
        current = self.disk.current.get(MODEL)
        if current is not None and self._loaded == current.digest:
            self._waiting.append(self._served(current))
        self.post(events.Tick())

    def _take_effect(self, wanted: list[actions.Action]) -> None:
        for action in wanted:
            kind = type(action)
            if kind is actions.Report:
                self._changed = True
            elif isinstance(action, actions.RequestBlocks):
                if self.link is not None:
                    self.link.ask(action)
            elif isinstance(action, actions.Prove):
                self._prove(action)
            elif isinstance(action, (actions.StartShadow, actions.StopShadow)):
                self._shadow = action if isinstance(action, actions.StartShadow) else None
            elif isinstance(action, actions.AskEndpoint):
                self._ask_endpoint(action)
            else:
                outcome = self.disk.do(action)
                if isinstance(outcome, events.Switched) and isinstance(action, actions.Switch):
                    outcome = replace(outcome, calls=self._calls[action.bundle.digest])
                if kind in (actions.Switch, actions.RollBack, actions.Remove):
                    self._switched()
                if outcome is not None:
                    self._waiting.append(outcome)

    def _prove(self, action: actions.Prove) -> None:
        name, bundle = action.model, action.bundle
        self._waiting.append(events.Proving(name, bundle.digest))
        defect = self._defect(bundle)
        error = "golden vectors do not match" if defect.golden_vectors and not self._proves_all else None
        seconds = self._world.scenario.runtime.prove_seconds * self.traits.slow * self._chance.uniform(0.7, 1.3)
        latency = self._latency(bundle) if bundle.config.backend != BACKEND else None
        self._later(seconds, lambda: self.post(events.Proved(name, bundle.digest, error, latency=latency)))

    def _latency(self, bundle: Bundle) -> Latency:
        """Measure a call, as the proof does."""
        p50 = self._runtime.median_ms * self._defect(bundle).latency * self._chance.uniform(0.97, 1.03)
        files = bundle.files[bundle.config.entry].digest
        return Latency(bundle=bundle.digest, files=files, p50_ms=p50, p95_ms=1.1 * p50, calls=20)

    def _ask_endpoint(self, action: actions.AskEndpoint) -> None:
        """Send golden samples through the served endpoint."""

        def answered() -> None:
            name, digest, attempt = action.model, action.digest, action.attempt
            current = self.disk.current.get(name)
            if current is None or current.digest != digest or self._loaded != digest:
                event = events.EndpointAnswered(
                    model=name, digest=digest, attempt=attempt, error="another bundle answers"
                )
            elif self._defect(current).golden_vectors and not self._proves_all:
                error = "golden samples do not match"
                event = events.EndpointAnswered(model=name, digest=digest, attempt=attempt, error=error, wrong=True)
            else:
                event = events.EndpointAnswered(model=name, digest=digest, attempt=attempt, samples=GOLDEN_SAMPLES)
            self.post(event)

        self._later(_ENDPOINT_SECONDS * self.traits.slow, answered)

    # The runtime.

    @property
    def _does_nothing(self) -> bool:
        return self.traits.lie is not None and self.traits.lie.does_nothing

    @property
    def _proves_all(self) -> bool:
        return self.traits.lie is not None and self.traits.lie.proves_all

    def _defect(self, bundle: Bundle) -> Defect:
        return self._world.scenario.defect(bundle.config.version, self.traits.target, bundle.config.backend)

    def _switched(self) -> None:
        current = self.disk.current.get(MODEL)
        if not self._does_nothing:
            self.running = None if current is None else current.digest
            self._really = current
            if current is not None:
                self.reached.add(current.digest)
                self._world.note(self.traits.name, "switched", current.config.version)
        self._runtime.restarted()
        self._measured_at = self._world.steady()
        self._loaded = None
        self._load()

    def _load(self) -> None:
        current = self.disk.current.get(MODEL)
        if current is None:
            return

        def loaded() -> None:
            if self.disk.current.get(MODEL) is current:
                self._loaded = current.digest
                self.post(self._served(current))
                self._await_call(current.digest)

        self._later(self._world.scenario.runtime.load_seconds * self.traits.slow, loaded)

    def _await_call(self, digest: str) -> None:
        """Count the first call of a user, when it comes."""
        rate = self._world.scenario.runtime.calls_per_minute / 60.0

        def came() -> None:
            if self._loaded == digest:
                self._calls[digest] += 1
                self.post(events.Counted(MODEL, digest, self._calls[digest]))

        if rate and MODEL in self.machine.unattested():
            self._later(self._chance.expovariate(rate), came)

    def _served(self, bundle: Bundle) -> events.Event:
        refused = self._defect(bundle).refuses_to_load and not self._does_nothing
        return events.Served(MODEL, bundle.digest, "the runtime refuses the file" if refused else None)

    # What it says.

    def _command(self, verb: str) -> str | None:
        if verb != "report":
            return f"unknown verb {verb!r}"
        self._report()
        return None

    def _report(self) -> None:
        if self.link is None:
            return
        self._seq += 1
        trust = self.machine.desired_states.trust
        models = self.machine.reported()
        self._note_progress(models)
        if self.traits.lie is not None:
            models = self.traits.lie.reported(models, self._really)
        self.link.reported(
            Reported(
                boot_id=self._boots[-1],
                seq=self._seq,
                target=self.traits.target,
                agent_version=__version__,
                architecture="aarch64",
                python="3.11",
                runtimes={RUNTIME: "1.0"},
                free_bytes=self.disk.free_bytes,
                desired_version=self.machine.desired_version,
                models=models,
                refused=self.machine.desired_states.refused,
                serving_restarts=self.machine.serving_restarts,
                trusted_keys=() if trust is None else tuple(key.id for role in Role for key in trust.keys(role)),
                at=self._wall(),
            )
        )

    def _note_progress(self, models: dict[str, ReportedModel]) -> None:
        model = models.get(MODEL)
        self.measured |= model is not None and len(model.candidates) > 1
        failure = None if model is None else model.failure
        if failure is not None:
            self.refused.add(failure.digest)
        told = (None if model is None else model.state, failure)
        if told != self._told and model is not None:
            self._told = told
            detail = f"{failure.stage}: {failure.reason}" if failure is not None else ""
            if model.state in (ModelState.FAILED, ModelState.SERVING):
                self._world.note(self.traits.name, model.state.value, detail)

    def _send_telemetry(self) -> None:
        """Send telemetry, now and again."""
        self._later(self._world.scenario.telemetry, self._send_telemetry)
        now = self._world.steady()
        interval = now - self._measured_at
        if self.link is None or not self.link.connection.connected or interval <= 0:
            return
        self._measured_at = now
        self._telemetry_seq += 1
        current = self.disk.current.get(MODEL)
        models, memory = {}, 0
        if current is not None and self._loaded == current.digest:
            # A device that does nothing has the old release's figures, whatever it says that it runs.
            figures = self._runtime.measure(interval, Defect() if self._does_nothing else self._defect(current))
            if self.traits.lie is not None:
                figures = self.traits.lie.figures(figures)
            self._calls[current.digest] += figures.inferences
            said = self._really if self.traits.lie is Lie.STALE else current
            models[MODEL] = self._model_telemetry((said or current).digest, figures)
            memory = figures.memory_bytes
        self.link.telemetry(
            Telemetry(
                boot_id=self._boots[-1],
                seq=self._telemetry_seq,
                interval=interval,
                models=models,
                cpu_percent=30.0,
                memory_total_bytes=MEMORY_BYTES,
                memory_available_bytes=MEMORY_BYTES - (1 << 30) - memory,
                agent_bytes=(40 << 20) + memory,
                free_bytes=self.disk.free_bytes,
                temperature_c=self._world.scenario.runtime.temperature_c,
                at=self._wall(),
            )
        )
        if current is not None and MODEL in self.machine.unattested():
            self.post(events.Counted(MODEL, current.digest, self._calls[current.digest]))

    def _model_telemetry(self, digest: str, figures: Figures) -> ModelTelemetry:
        self._totals[0] += figures.inferences
        self._totals[1] += figures.errors
        return ModelTelemetry(
            digest=digest,
            inferences=figures.inferences,
            errors=figures.errors,
            inferences_total=self._totals[0],
            errors_total=self._totals[1],
            latency_ms=figures.latency_ms(),
            latency_buckets=figures.latency_buckets(),
            memory_bytes=figures.memory_bytes,
            shadow=self._shadow_telemetry(figures.inferences),
        )

    def _shadow_telemetry(self, inferences: int) -> ShadowTelemetry | None:
        shadow = self._shadow
        bundle = None if shadow is None else self.disk.assembled.get(shadow.digest)
        if shadow is None or bundle is None:
            return None
        defect = Defect() if self._does_nothing else self._defect(bundle)
        classes = self._runtime.shadowed(inferences, shadow.share, defect)
        compared, agreed = (sum(counts[place] for counts in classes.values()) for place in (0, 1))
        return ShadowTelemetry(digest=shadow.digest, compared=compared, agreed=agreed, classes=classes)

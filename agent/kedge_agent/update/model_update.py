"""The update of one model from a desired digest to a serving bundle."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from kedge_agent.update import actions, compatibility, events
from kedge_agent.update.fetch import Fetches, Outcome
from kedge_agent.update.settings import Settings
from kedge_protocol import candidates, codec
from kedge_protocol.blocks import BLOCK_SIZE, block_count
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Bundle, parse_bundle, parse_manifest
from kedge_protocol.errors import BundleError, KedgeError
from kedge_protocol.messages import Failure, Latency, ModelState

T = TypeVar("T")


class Step(enum.Enum):
    """The step of an update, with the state that is reported for it."""

    MANIFEST = ModelState.FETCHING, "manifest"
    CONFIG = ModelState.FETCHING, "configuration"
    MEASURE = ModelState.FETCHING, "checking runtime and room"
    FILES = ModelState.FETCHING, "files"
    ASSEMBLE = ModelState.PROVING, "assembling"
    PROVE = ModelState.PROVING, "golden vectors"
    PROVED = ModelState.PROVING, "proved; the other candidate follows"
    SWITCH = ModelState.SWITCHING, "switching"
    SERVE = ModelState.SWITCHING, "waiting for the serving process"
    DONE = ModelState.SERVING, None
    SHADOW = ModelState.SERVING, "on live inputs"
    FAILED = ModelState.FAILED, None

    @property
    def fetching(self) -> bool:
        """Return whether the controller is needed to continue."""
        return self in (Step.MANIFEST, Step.CONFIG, Step.FILES)

    @property
    def ended(self) -> bool:
        """Return whether nothing is left to do."""
        return self in (Step.DONE, Step.SHADOW, Step.FAILED)


@dataclass
class UpdateContext:
    """State and callbacks shared by the models of one machine.

    Attributes:
        emit: called with each action.
        changed: called when a model's reported state has changed.
        failed, served: called when a model's update has ended (for the persistent state).
        switched: called when a bundle has become current, with the calls counted of it before.
        make_room: emits the removal of everything that neither slots nor updates need.
        disk_at, proofs_at: times of the last outcome of the disk's and the proofs' thread.
    """

    target: str
    settings: Settings
    fetches: Fetches
    emit: Callable[[actions.Action], None]
    changed: Callable[[], None]
    failed: Callable[[ModelUpdate, Failure], None]
    served: Callable[[ModelUpdate], None]
    switched: Callable[[ModelUpdate, int | None], None]
    make_room: Callable[[], None]
    now: float = 0.0
    disk_at: float = 0.0
    proofs_at: float = 0.0


class ModelUpdate:
    """The update of one model to one digest.

    Args:
        context: state shared with the other models.
        name: name of the model.
        digest: the desired digest.
        size: size of the bundle's manifest; None if the desired state does not say.
        installed: the installed bundles.
        run: for a shadow or one of two candidates: called once it is proved, in the place of a switch.
        then: the step that it is in from then on.
    """

    def __init__(
        self,
        context: UpdateContext,
        name: str,
        digest: str,
        size: int | None,
        installed: events.Installed,
        *,
        run: Callable[[], None] | None = None,
        then: Step = Step.SHADOW,
    ) -> None:
        self.name = name
        # No model has a name with a space: a model and its shadow fetch for themselves.
        self.key = name if run is None or then is not Step.SHADOW else f"{name} shadow"
        self._run, self._then = run, then
        self.digest = digest
        self.installed = installed
        self.step = Step.MANIFEST
        self.since = context.now
        self.progress_at = context.now
        """Time of the last sign of the controller, or of its absence."""
        self.failure: Failure | None = None
        self.detail: str | None = None
        """Description of the proof's progress, later of what runs the bundle; None if the step says it all."""
        self.received = 0
        self.layers: dict[str, int] = {}
        self._size = size
        self._left: set[str] = set()
        self._context = context
        self._manifest = b""
        self._bundle: Bundle | None = None
        self._made_room = False
        self._ran: str | None = None
        self.latency: Latency | None = None
        """Latency measured by this update's proof; None before it, and if the bundle was already installed."""

    def start(self) -> None:
        """Take the first step."""
        if self.installed.current == self.digest and self._run is None:
            self._go(Step.SERVE)
        elif self._size is None:
            self.fail("fetch", f"the desired state gives no size for {self.digest}")
        else:
            self._context.fetches.want(self.key, self.digest, self._size, read=True)

    def restore(self, failure: Failure) -> None:
        """Restore a failure from before a restart; it is not retried."""
        self.failure = failure
        self._go(Step.FAILED)

    def stop(self) -> None:
        """Stop an update that is no longer wanted."""
        self._context.fetches.unwant(self.key)

    @property
    def serves(self) -> bool:
        """Return whether the desired bundle is current and serves."""
        return self.step is Step.DONE and self.installed.current == self.digest

    @property
    def is_candidate(self) -> bool:
        """Return whether it is one of two, and not chosen yet."""
        return self._run is not None and self._then is Step.PROVED

    @property
    def is_proved(self) -> bool:
        """Return whether it is a candidate that passed its proof and waits for the choice."""
        return self.step is Step.PROVED

    @property
    def max_ms(self) -> float | None:
        """Return the latency in milliseconds that the bundle's budget allows; None for any."""
        return None if self._bundle is None else candidates.allowed_ms(self._bundle.config)

    @property
    def transfer_bytes(self) -> int:
        """Return the size of all blobs of the bundle; 0 before its configuration is available."""
        return 0 if self._bundle is None else self._bundle.transfer_bytes

    @property
    def digests(self) -> set[str]:
        """Return the digests that garbage collection must keep."""
        found = {self.digest, *self.layers}
        if self._bundle is not None:
            found.add(self._bundle.manifest.config.digest)
        return found | {fetch.digest for fetch in self._context.fetches.of(self.key)}

    @property
    def blocks_total(self) -> int:
        """Return the number of blocks of all files; 0 before the manifest is available."""
        return sum(block_count(size) for size in self.layers.values())

    @property
    def blocks_done(self) -> int:
        """Return the number of these blocks on the device."""
        done = sum(block_count(size) for digest, size in self.layers.items() if digest not in self._left)
        if self.step is not Step.FILES:
            return done
        return done + sum(fetch.blocks_done for fetch in self._context.fetches.of(self.key))

    def fetched(self, outcome: Outcome) -> None:
        """Handle the arrival or failure of an awaited blob."""
        if outcome.error is not None:
            self.fail("fetch", outcome.error)
        elif self.step is Step.MANIFEST and outcome.digest == self.digest:
            self._guarded("check", self._take_manifest, outcome.data or b"")
        elif self.step is Step.CONFIG:
            self._guarded("check", self._take_config, outcome.data or b"")
        elif self.step is Step.FILES:
            self._left.discard(outcome.digest)
            self._assemble_when_complete()

    def measured(self, event: events.Measured) -> None:
        """Handle the device's resources: refuse the bundle or pull its files."""
        if self.step is Step.MEASURE and event.digest == self.digest and self._bundle is not None:
            if event.error is not None:
                self.fail("check", f"what the device has cannot be found out: {event.error}")
                return
            self._guarded("check", self._check_device, event)

    def assembled(self, event: events.Assembled) -> None:
        """Handle the finished slot."""
        if self.step is Step.ASSEMBLE and event.digest == self.digest and self._bundle is not None:
            if event.error is not None:
                self.fail("check", event.error)
                return
            self._go(Step.PROVE)
            shadow = self._run is not None and self._then is Step.SHADOW
            self._context.emit(actions.Prove(self.name, self._bundle, beside=shadow))

    def proving(self, event: events.Proving) -> None:
        """Handle progress of the proof."""
        if self.step is Step.PROVE and event.digest == self.digest and event.detail is not None:
            self._note(event.detail)

    def proved(self, event: events.Proved) -> None:
        """Handle the result of the golden vectors."""
        if self.step is Step.PROVE and event.digest == self.digest and self._bundle is not None:
            if event.error is not None:
                self.fail("prove", event.error)
                return
            self._ran = event.detail
            self.latency = event.latency
            if self._run is not None:
                self._go(self._then)
                self._run()
                return
            self._switch()

    def take(self, installed: events.Installed) -> None:
        """Go on with a proved candidate that was chosen."""
        self._run, self.installed = None, installed
        if installed.current == self.digest:
            self._go(Step.SERVE)
        else:
            self._switch()

    def _switch(self) -> None:
        if self._bundle is not None:
            self._go(Step.SWITCH)
            self._context.emit(actions.Switch(self.name, self._bundle))

    def switched(self, event: events.Switched) -> None:
        """Handle a change of the slots."""
        self.installed = event.installed or self.installed
        current = self.installed.current
        late = self.step is Step.FAILED and self.failure is not None and self.failure.stage == "switch"
        if self.step is Step.SWITCH and (event.error is not None or current != self.digest):
            self.fail("switch", event.error or "the slot did not become current")
        elif self.step is Step.SWITCH or (late and event.error is None and current == self.digest):
            self.failure = None
            self._go(Step.SERVE)
            self._context.switched(self, event.calls)
        elif self.step in (Step.SERVE, Step.DONE) and current != self.digest:
            # An earlier switch was still under way when this update began.
            self._go(Step.MANIFEST)
            self.start()
        self._context.changed()

    def served(self, event: events.Served, *, confirmed: bool, crashing: bool = False) -> None:
        """Handle the serving process's report about the current bundle.

        Args:
            confirmed: whether this digest has been seen serving, so that an error now is no reason to roll back.
            crashing: whether the process is in a crash loop, so that serving at this moment is no recovery.
        """
        if event.digest != self.digest or self.installed.current != self.digest or self._run is not None:
            return
        if event.error is None:
            fell = self.step is Step.FAILED and self.failure is not None and self.failure.stage == "serve"
            if self.step is Step.SERVE or (fell and not crashing):
                self.failure = None
                self._go(Step.DONE)
                self._context.served(self)
            # Without a serving process the proof's word is all there is.
            self._note(event.detail or self._ran)
        elif self.step in (Step.SERVE, Step.DONE):
            self._serve_failed(event.error, confirmed=confirmed)

    def tick(self, *, confirmed: bool) -> None:
        """Handle the passage of time; every step has a deadline."""
        context, limits = self._context, self._context.settings
        if self.step is Step.SERVE and context.now - self.since > limits.serve_deadline:
            reason = f"the serving process did not load it within {limits.serve_deadline:g} s"
            self._serve_failed(reason, confirmed=confirmed)
        elif self.step is Step.PROVE and context.now - max(self.since, context.proofs_at) > limits.prove_deadline:
            self.fail("prove", f"the golden vectors did not end within {limits.prove_deadline:g} s")
        elif self._waits_for_disk and context.now - max(self.since, context.disk_at) > limits.disk_deadline:
            what = self.step.value[1]
            self.fail(self._stage, f"the disk did not end its work within {limits.disk_deadline:g} s ({what})")
        elif self.step.fetching and context.now - self.progress_at > limits.fetch_deadline:
            self.fail("fetch", f"the controller is there, but nothing came for {limits.fetch_deadline:g} s")
        if not self.step.fetching or not context.fetches.traffic.ready:
            self.progress_at = context.now

    @property
    def _waits_for_disk(self) -> bool:
        if self.step.fetching:
            return any(fetch.on_disk for fetch in self._context.fetches.of(self.key))
        return self.step in (Step.MEASURE, Step.ASSEMBLE, Step.SWITCH)

    @property
    def _stage(self) -> str:
        """Return the stage reported for a failure in this step."""
        if self.step is Step.SWITCH:
            return "switch"
        return "fetch" if self.step.fetching else "check"

    def crashed(self, reason: str, *, roll_back: bool) -> None:
        """Handle a crash loop of the serving process while this bundle was current."""
        if self.step in (Step.SERVE, Step.DONE):
            self.fail("serve", reason)
            if roll_back:
                self._context.emit(actions.RollBack(self.name))

    def wrong_at_the_endpoint(self, reason: str) -> None:
        """Handle golden samples that the served endpoint answered wrongly: nothing is better than a wrong answer."""
        if self.serves:
            self.fail("prove", f"golden samples through the served endpoint: {reason}")
            self._context.emit(actions.RollBack(self.name))

    def fail(self, stage: str, reason: str) -> None:
        """Refuse the desired bundle; the previous one keeps serving."""
        self.stop()
        # What a foreign error says may hold what UTF-8 cannot (a file's name).
        self.failure = Failure(digest=self.digest, stage=stage, reason=codec.sayable(reason))
        self._go(Step.FAILED)
        self._context.failed(self, self.failure)

    def _serve_failed(self, reason: str, *, confirmed: bool) -> None:
        self.fail("serve", reason)
        if not confirmed:
            self._context.emit(actions.RollBack(self.name))

    def _take_manifest(self, raw: bytes) -> None:
        manifest = parse_manifest(raw, where=f"bundle {self.digest[:19]}")
        for layer in manifest.layers:
            if layer.size > BLOCK_SIZE and oci.BLOCKS not in layer.annotations:
                raise BundleError(f"the layer {layer.title!r} has no {oci.BLOCKS}")
        self._manifest = raw
        self._go(Step.CONFIG)
        self._context.fetches.want(self.key, manifest.config.digest, manifest.config.size, read=True)

    def _take_config(self, raw: bytes) -> None:
        bundle = parse_bundle(self._manifest, raw, where=f"bundle {self.digest[:19]}")
        compatibility.require_target(bundle.config, self.name, self._context.target)
        self._bundle = bundle
        self._go(Step.MEASURE)
        self._context.emit(actions.Measure(self.name, bundle))

    def _check_device(self, event: events.Measured) -> None:
        bundle = self._bundle
        if bundle is None:
            return
        compatibility.require_runtime(bundle.config, event)
        reserve = self._context.settings.reserve_bytes
        try:
            compatibility.require_room(event, reserve)
        except KedgeError:
            if self._made_room:
                raise
            # What nobody needs goes first; then it is measured again.
            self._made_room = True
            self._context.make_room()
            self._context.emit(actions.Measure(self.name, bundle))
            return
        self.layers = {layer.digest: layer.size for layer in bundle.manifest.layers}
        self._left = set(self.layers)
        self._go(Step.FILES)
        for layer in {layer.digest: layer for layer in bundle.manifest.layers}.values():
            map_digest = layer.annotations.get(oci.BLOCKS) if layer.size > BLOCK_SIZE else None
            self._context.fetches.want(self.key, layer.digest, layer.size, map_digest=map_digest)
        self._assemble_when_complete()

    def _assemble_when_complete(self) -> None:
        if not self._left and self._bundle is not None:
            self._go(Step.ASSEMBLE)
            self._context.emit(actions.Assemble(self.name, self._bundle))

    def _guarded(self, stage: str, function: Callable[[T], None], argument: T) -> None:
        try:
            function(argument)
        except KedgeError as error:
            self.fail(stage, str(error))

    def _go(self, step: Step) -> None:
        self.step = step
        self.since = self._context.now
        self.detail = None
        self._context.changed()

    def _note(self, detail: str | None) -> None:
        if detail != self.detail:
            self.detail = detail
            self._context.changed()

"""The update machine of one device: :meth:`Machine.handle` takes an event and returns the resulting actions."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kedge_agent.update import actions, events
from kedge_agent.update.actions import Action, PersistentState, Refusal
from kedge_agent.update.attestation import Attestations
from kedge_agent.update.block_requests import BlockRequests
from kedge_agent.update.contests import Contests
from kedge_agent.update.crashes import Crashes
from kedge_agent.update.desired_states import DesiredStates, Identity
from kedge_agent.update.fetch import Fetches, Outcome
from kedge_agent.update.model_update import ModelUpdate, Step, UpdateContext
from kedge_agent.update.report import reported_model
from kedge_agent.update.settings import Settings
from kedge_agent.update.shadows import Shadows
from kedge_protocol.messages import Desired, Failure, ReportedModel

PROGRESS_INTERVAL = 1.0
"""Seconds between two reports that contain progress only."""
RECEIVED_INTERVAL = 5.0
"""Seconds between two writes of the received byte count; a crash can lose this much of it."""
REMOVE_AGAIN = 60.0
"""Seconds before a failed removal is retried."""
_FROM_DISK = (events.BlobOpened, events.BlobStored, events.WriteFailed, events.Measured, events.Assembled,
              events.Switched)  # fmt: skip
_FROM_PROOFS = (events.Proving, events.Proved)


class Machine:
    """Turns desired states into actions. Equal events, at equal times, from an equal start give equal actions.

    Args:
        identity: name and target of this device, and the keys that its kit gave.
        boot_id: boot id of this start; part of every request's id.
        memory: persistent state of the previous run (:class:`~kedge_agent.update.actions.Remember`).
        installed: model name → content of its slots.
        settings: limits of the update logic.
        seed: seed of the jitter.
        now: seconds of any monotonic clock.
    """

    def __init__(
        self,
        *,
        identity: Identity,
        boot_id: str,
        memory: PersistentState,
        installed: Mapping[str, events.Installed],
        settings: Settings | None = None,
        seed: int = 0,
        now: float = 0.0,
    ) -> None:
        trusted = memory.trust(identity.trust)
        self.desired_states = DesiredStates(memory.desired, replace(identity, trust=trusted))
        self._memory = replace(memory, pinned=identity.trust, trusted=trusted)
        self._installed = dict(installed)
        self._actions: list[Action] = []
        self._changed = True
        self._progress = False
        self._reported_at = self._kept_at = now
        self._vain = 0
        self._garbage = False
        settings = settings or Settings()
        self._attestations = Attestations(
            memory.attested,
            settings,
            emit=self._emit,
            changed=self._note_change,
            keep=lambda: self._keep(self._memory),
        )
        self._crashes = Crashes(settings.crashes, settings.crash_window)
        self._traffic = BlockRequests(boot_id, settings, random.Random(seed))
        self._fetches = Fetches(self._traffic, self._emit)
        self._context = UpdateContext(
            target=identity.target,
            settings=settings,
            fetches=self._fetches,
            emit=self._emit,
            changed=self._note_change,
            failed=self._note_failure,
            served=self._note_served,
            switched=self._note_switched,
            make_room=self._collect,
            now=now,
            disk_at=now,
            proofs_at=now,
        )
        self._shadows = Shadows(self._context)
        self._contests = Contests(memory.choices, new=self._new_candidate, decided=self._decided)
        self._models: dict[str, ModelUpdate] = {}
        self._removing: dict[str, float] = {}
        self._handlers = self._by_event()

    def _by_event(self) -> dict[type, Callable[[Any], None]]:
        return {
            events.Connected: lambda _: self._connected(),
            events.Disconnected: lambda _: self._disconnected(),
            events.ControllerSeen: self._controller_seen,
            events.DesiredArrived: self._desired_arrived,
            events.BlockArrived: self._block_arrived,
            events.Tick: lambda _: self._tick(),
            events.BlobOpened: self._fetches.opened,
            events.BlobStored: self._fetches.stored,
            events.WriteFailed: self._fetches.write_failed,
            events.Measured: lambda event: self._dispatch(event, ModelUpdate.measured),
            events.Assembled: lambda event: self._dispatch(event, ModelUpdate.assembled),
            events.Proving: lambda event: self._dispatch(event, ModelUpdate.proving),
            events.Proved: lambda event: self._dispatch(event, ModelUpdate.proved),
            events.Switched: self._switched,
            events.Served: self._served,
            events.Counted: self._attestations.counted,
            events.EndpointAnswered: self._endpoint_answered,
            events.ServingDied: self._serving_died,
            events.ShadowEnded: self._shadows.ended,
        }

    @property
    def desired_version(self) -> int:
        """Return the version of the accepted desired state; 0 before the first."""
        return self.desired_states.version

    @property
    def controller_is_there(self) -> bool:
        """Return whether this device is connected and a controller reports as online."""
        return self._traffic.ready

    @property
    def settled(self) -> bool:
        """Return whether every model has reached a final state."""
        return all(update.step.ended for update in self._models.values())

    def unattested(self) -> dict[str, str]:
        """Return the models that serve while nothing attests it yet, with their digest: their calls are awaited."""
        return {
            name: update.digest
            for name, update in self._models.items()
            if update.serves and self._attestations.is_open(name, update.digest)
        }

    def start(self, now: float) -> list[Action]:
        """Resume from the previous run. Call it once, before any event."""
        self._context.now = now
        self._shadows.at(now=now)
        if self.desired_states.current is not None:
            self._work_towards(self.desired_states.current, restored=True)
        else:
            for name, there in self._installed.items():
                if there.current is not None:
                    self._new(name, there.current, None, restored=True).start()
        return self._finish()

    def handle(self, event: events.Event, now: float) -> list[Action]:
        """Handle one event.

        Args:
            event: see :mod:`kedge_agent.update.events`.
            now: seconds of the same monotonic clock each time.

        Returns:
            The actions, to be performed in this order.
        """
        self._context.now = now
        if isinstance(event, _FROM_DISK):
            self._context.disk_at = now
        elif isinstance(event, _FROM_PROOFS):
            self._context.proofs_at = now
        self._shadows.at(now=now)
        self._handlers[type(event)](event)
        return self._finish()

    def reported(self) -> dict[str, ReportedModel]:
        """Return the reported state of each model."""
        return {name: self._reported(name, update) for name, update in sorted(self._models.items())}

    def _reported(self, name: str, update: ModelUpdate) -> ReportedModel:
        found = reported_model(
            update,
            self._fetches,
            self._memory.latencies.get(name),
            self._context.now,
            self._attestations.reported(name, update.digest) if update.serves else None,
            self._shadows.reported(name),
        )
        desired = self._contests.first(name) or update.digest
        return replace(found, desired=desired, candidates=self._contests.reported(name))

    @property
    def serving_restarts(self) -> int:
        """Return the number of deaths and hangs of the serving process since the agent's start."""
        return self._crashes.total

    # Events.

    def _connected(self) -> None:
        self._traffic.connected()
        self._changed = True

    def _disconnected(self) -> None:
        self._traffic.disconnected()
        self._changed = True

    def _controller_seen(self, event: events.ControllerSeen) -> None:
        was = self._traffic.ready
        self._traffic.controller_seen(event.status)
        self._changed |= was != self._traffic.ready

    def _desired_arrived(self, event: events.DesiredArrived) -> None:
        taken = self.desired_states.take(event.raw)
        self._changed |= self.desired_states.news
        desired = self.desired_states.current
        if self.desired_states.trust != self._memory.trusted:
            self._keep(replace(self._memory, trusted=self.desired_states.trust))
        if not taken or desired is None:
            return
        self._attestations.forget(self._memory.attested.keys() - desired.models.keys())
        refused = {name: one for name, one in self._memory.refused.items() if one.version == desired.order(name)}
        self._contests.take(desired, refused)
        self._memory = replace(
            self._memory,
            desired=event.raw.decode(),
            refused=refused,
            attested=self._attestations.records,
            choices=self._contests.choices,
            served={name: seen for name, seen in self._memory.served.items() if name in desired.models},
            latencies={name: one for name, one in self._memory.latencies.items() if name in desired.models},
            probation={name: one for name, one in self._memory.probation.items() if name in desired.models},
        )
        self._emit(actions.Remember(self._memory))
        self._work_towards(desired, restored=False)

    def _block_arrived(self, event: events.BlockArrived) -> None:
        fetch = self._fetches.block(event.rid, event.answer, self._context.now)
        if fetch is not None:
            for update in filter(None, map(self._fetching, fetch.models)):
                update.received += len(event.answer.payload)
                update.progress_at = self._context.now
            self._progress = True
            if self._context.now - self._kept_at > RECEIVED_INTERVAL:
                self._keep(self._memory)

    def _tick(self) -> None:
        desired = self.desired_states.current
        for name, at in self._removing.items():
            if self._context.now - at > REMOVE_AGAIN:
                self._remove(name)
        for name, update in list(self._models.items()):
            update.tick(confirmed=self._is_confirmed(name))
            if update.serves:
                soak = 0.0 if desired is None else desired.soaks.get(name, 0.0)
                self._attestations.serves(name, update.digest, soak=soak, now=self._context.now)
            if self._on_probation(update) and update.step is Step.DONE and self._has_lasted(update):
                probation = {other: one for other, one in self._memory.probation.items() if other != name}
                self._keep(replace(self._memory, probation=probation))
        self._shadows.tick()

    def _dispatch(self, event: Any, method: Callable[[ModelUpdate, Any], None]) -> None:
        # An update heeds only what is of its own digest, which a model and its shadow never share.
        for update in filter(None, (self._models.get(event.model), self._shadows.get(event.model))):
            method(update, event)

    def _fetching(self, key: str) -> ModelUpdate | None:
        return self._models.get(key) or self._shadows.by_key(key)

    def _switched(self, event: events.Switched) -> None:
        if event.installed is not None:
            self._installed[event.model] = event.installed
            if event.installed.current is None:
                self._removing.pop(event.model, None)
        update = self._models.get(event.model)
        if update is not None:
            update.switched(event)

    def _served(self, event: events.Served) -> None:
        update = self._models.get(event.model)
        if update is not None:
            crashing = self._crashes.looping(self._context.now)
            update.served(event, confirmed=self._is_confirmed(event.model), crashing=crashing)

    def _endpoint_answered(self, event: events.EndpointAnswered) -> None:
        wrong = self._attestations.answered(event, self._context.now)
        update = self._models.get(event.model)
        if wrong is not None and update is not None and update.digest == event.digest:
            update.wrong_at_the_endpoint(wrong)

    def _serving_died(self, event: events.ServingDied) -> None:
        """Handle a death of the serving process. A single death is only a restart. A crash loop is blamed on a recent
        switch, which is rolled back if there is a previous bundle or if it never served. Otherwise every model counts
        as failed until the loop ends, and stays."""
        crashes, now = self._crashes, self._context.now
        crashes.note(now, came_up=event.came_up)
        self._changed = True
        if not crashes.looping(now):
            return
        count = crashes.lately(now)
        reason = f"the serving process died {count} times within {crashes.window:g} s; the last time: it {event.reason}"
        blamed = [update for update in self._models.values() if crashes.began(now) and self._can_be_blamed(update)]
        for update in blamed or list(self._models.values()):
            update.crashed(reason, roll_back=bool(blamed))
        if blamed:
            crashes.forget()

    def _can_be_blamed(self, update: ModelUpdate) -> bool:
        if not self._on_probation(update) or update.step not in (Step.SERVE, Step.DONE):
            return False
        return update.installed.previous is not None or not self._is_confirmed(update.name)

    def _on_probation(self, update: ModelUpdate) -> bool:
        return self._memory.probation.get(update.name) == update.digest

    def _has_lasted(self, update: ModelUpdate) -> bool:
        crashes, now = self._crashes, self._context.now
        return now - update.since > crashes.window and not crashes.lately(now)

    # What follows.

    def _remove(self, name: str) -> None:
        self._removing[name] = self._context.now
        self._emit(actions.Remove(name))

    def _work_towards(self, desired: Desired, *, restored: bool) -> None:
        for name in [name for name in self._models if name not in desired.models]:
            self._models.pop(name).stop()
        self._removing = {}
        for name, there in self._installed.items():
            if name not in desired.models and there.current is not None:
                self._remove(name)
                self._garbage = True
        for name in sorted(desired.models):
            update, wanted = self._models.get(name), self._contests.wanted(name, desired)
            if self._contests.is_open(name):
                continue
            if self._contests.begins(name, desired):
                if update is not None:
                    update.stop()
                self._contests.begin(name, desired)
                continue
            refusal = self._memory.refused.get(name)
            if refusal is not None and (refusal.version, refusal.failure.digest) != (desired.order(name), wanted):
                refusal = None
            is_right = update is not None and update.digest == wanted and not update.is_candidate
            if update is not None and is_right and (update.step is not Step.FAILED or refusal is not None):
                continue
            if update is not None:
                update.stop()
            if refusal is not None:
                self._new(name, wanted, None, restored=True).restore(refusal.failure)
            else:
                self._new(name, wanted, desired.sizes.get(wanted), restored=restored).start()
        self._garbage |= self._shadows.work_towards(desired)
        self._changed = True

    def _new(self, name: str, wanted: str, size: int | None, *, restored: bool) -> ModelUpdate:
        installed = self._installed.get(name, events.Installed())
        self._models[name] = update = ModelUpdate(self._context, name, wanted, size, installed)
        if restored:
            update.received = self._memory.received.get(wanted, 0)
        return update

    def _new_candidate(self, name: str, digest: str, size: int | None, proved: Callable[[], None]) -> ModelUpdate:
        installed = self._installed.get(name, events.Installed())
        update = ModelUpdate(self._context, name, digest, size, installed, run=proved, then=Step.PROVED)
        update.received = self._memory.received.get(digest, 0)
        self._models[name] = update
        return update

    def _decided(self, name: str, update: ModelUpdate) -> None:
        self._models[name] = update
        if update.failure is not None:
            self._note_failure(update, update.failure)
            return
        # First of all, so that a crash amid the switch asks for no second choice.
        self._keep(self._memory)
        update.take(self._installed.get(name, events.Installed()))

    def _is_confirmed(self, name: str) -> bool:
        update = self._models.get(name)
        return update is not None and self._memory.served.get(name) == update.digest

    def _emit(self, action: Action) -> None:
        self._actions.append(action)

    def _note_change(self) -> None:
        self._changed = True

    def _note_failure(self, update: ModelUpdate, failure: Failure) -> None:
        if self._contests.failed(update, failure):
            return
        self._garbage = True
        desired = self.desired_states.current
        refusal = Refusal(version=0 if desired is None else desired.order(update.name), failure=failure)
        self._keep(replace(self._memory, refused={**self._memory.refused, update.name: refusal}))

    def _note_served(self, update: ModelUpdate) -> None:
        self._garbage = True
        refused = {name: refusal for name, refusal in self._memory.refused.items() if name != update.name}
        served = {**self._memory.served, update.name: update.digest}
        measured = {} if update.latency is None else {update.name: update.latency}
        latencies = {**self._memory.latencies, **measured}
        self._keep(replace(self._memory, refused=refused, served=served, latencies=latencies))

    def _note_switched(self, update: ModelUpdate, calls: int | None) -> None:
        self._attestations.switched(update.name, update.digest, calls)
        self._keep(replace(self._memory, probation={**self._memory.probation, update.name: update.digest}))

    def _keep(self, content: PersistentState) -> None:
        self._kept_at = self._context.now
        received = {one.digest: one.received for one in self._models.values()}
        content = replace(
            content, received=received, attested=self._attestations.records, choices=self._contests.choices
        )
        if content != self._memory:
            self._memory = content
            self._emit(actions.Remember(content))

    def _finish(self) -> list[Action]:
        while self._fetches.outcomes:
            self._deliver(self._fetches.outcomes.pop(0))
        self._actions.extend(self._traffic.asks(self._context.now))
        if self._vain != self._traffic.vain:
            self._vain = self._traffic.vain
            self._changed = True
        if self._garbage and self.settled:
            self._garbage = False
            self._collect()
        if self._changed or (self._progress and self._context.now - self._reported_at >= PROGRESS_INTERVAL):
            self._changed = self._progress = False
            self._reported_at = self._context.now
            self._emit(actions.Report())
        done, self._actions = self._actions, []
        return done

    def _collect(self) -> None:
        unsettled = [update for update in self._models.values() if update.step is not Step.DONE]
        unsettled += self._shadows
        keep = frozenset(self._contests.digests).union(*(update.digests for update in unsettled))
        self._emit(actions.CollectGarbage(keep))

    def _deliver(self, outcome: Outcome) -> None:
        for key in sorted(outcome.models):
            update = self._fetching(key)
            if update is not None:
                update.fetched(outcome)

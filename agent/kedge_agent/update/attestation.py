"""Attests that the current bundles serve: by calls of users, or by golden samples sent through the served endpoint
where no call comes within the soak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from kedge_agent.update import actions, events
from kedge_agent.update.actions import Attested
from kedge_agent.update.settings import Settings
from kedge_protocol import codec
from kedge_protocol.messages import Served

_LONGEST_RETRY = 3600.0


@dataclass
class _Attempts:
    """The attempts to send golden samples of one bundle.

    Attributes:
        since: time from which on the bundle served.
        attempt, asked_at: the attempt under way, and when it began; 0 and None without one.
        next_at: time before which there is no further attempt.
        failures: number of attempts in vain.
    """

    digest: str
    since: float
    attempt: int = 0
    asked_at: float | None = None
    next_at: float = 0.0
    failures: int = 0
    problem: str | None = None


class Attestations:
    """What attests each model's current bundle.

    Args:
        remembered: what the persistent state holds.
        settings: deadlines.
        emit: called with each action.
        changed: called when something that is reported has changed.
        keep: called when something that outlives a restart has changed.
    """

    def __init__(
        self,
        remembered: Mapping[str, Attested],
        settings: Settings,
        *,
        emit: Callable[[actions.Action], None],
        changed: Callable[[], None],
        keep: Callable[[], None],
    ) -> None:
        self._records = dict(remembered)
        self._tries: dict[str, _Attempts] = {}
        self._settings = settings
        self._emit = emit
        self._changed = changed
        self._keep = keep
        self._attempts = 0

    @property
    def records(self) -> dict[str, Attested]:
        """Return what is to be remembered."""
        return dict(self._records)

    def switched(self, model: str, digest: str, calls: int | None) -> None:
        """Begin anew: this bundle has become current.

        Args:
            calls: calls counted of it before; None if unknown.
        """
        self._records[model] = Attested(digest=digest, base=calls)
        self._tries.pop(model, None)
        self._keep()

    def forget(self, models: set[str]) -> None:
        """Discard these models, which are no longer desired."""
        for model in models & self._records.keys():
            del self._records[model]
        for model in models & self._tries.keys():
            del self._tries[model]

    def serves(self, model: str, digest: str, *, soak: float, now: float) -> None:
        """Handle a moment at which a desired bundle serves: ask for golden samples if none of its calls came in time.

        Args:
            soak: seconds to wait for calls of users.
        """
        record, tries = self._record(model, digest), self._tries_of(model, digest, now)
        if record.calls or record.golden:
            return
        if tries.asked_at is not None and now - tries.asked_at > self._settings.prove_deadline:
            self._failed(tries, f"the served endpoint did not answer within {self._settings.prove_deadline:g} s", now)
        if tries.asked_at is None and now >= max(tries.since + soak, tries.next_at):
            self._attempts += 1
            tries.attempt, tries.asked_at = self._attempts, now
            self._emit(actions.AskEndpoint(model, digest, tries.attempt))

    def counted(self, event: events.Counted) -> None:
        """Handle a new count of calls."""
        record = self._records.get(event.model)
        if record is None or record.digest != event.digest:
            return
        base = event.calls if record.base is None else min(record.base, event.calls)
        new = replace(record, base=base, calls=max(record.calls, event.calls - base))
        self._records[event.model] = new
        if new.base != record.base or bool(new.calls) != bool(record.calls):
            self._changed()
            self._keep()

    def answered(self, event: events.EndpointAnswered, now: float) -> str | None:
        """Handle the endpoint's answers.

        Returns:
            Why the bundle is to be refused: its answers are wrong; else None.
        """
        record, tries = self._records.get(event.model), self._tries.get(event.model)
        if record is None or tries is None or record.digest != event.digest or tries.digest != event.digest:
            return None
        if tries.asked_at is None or tries.attempt != event.attempt:
            return None
        if event.error is not None:
            self._failed(tries, event.error, now)
            return tries.problem if event.wrong else None
        tries.asked_at, tries.problem = None, None
        self._records[event.model] = replace(record, golden=event.samples)
        self._changed()
        self._keep()
        return None

    def reported(self, model: str, digest: str) -> Served:
        """Return what is reported of a bundle that serves."""
        record, tries = self._records.get(model), self._tries.get(model)
        if record is None or record.digest != digest:
            return Served()
        problem = None if tries is None or tries.digest != digest else tries.problem
        return Served(calls=record.calls, golden=record.golden, problem=problem)

    def is_open(self, model: str, digest: str) -> bool:
        """Return whether nothing attests this bundle yet."""
        return self.reported(model, digest).by is None

    def _failed(self, tries: _Attempts, problem: str, now: float) -> None:
        tries.next_at = now + min(self._settings.endpoint_retry * 2**tries.failures, _LONGEST_RETRY)
        tries.failures = min(tries.failures + 1, 32)
        tries.asked_at = None
        said = codec.sayable(problem)
        if said != tries.problem:
            tries.problem = said
            self._changed()

    def _record(self, model: str, digest: str) -> Attested:
        record = self._records.get(model)
        if record is None or record.digest != digest:
            # Its switch was not seen, as after a restart or a way back: the first count becomes the base.
            record = self._records[model] = Attested(digest=digest)
            self._keep()
        return record

    def _tries_of(self, model: str, digest: str, now: float) -> _Attempts:
        tries = self._tries.get(model)
        if tries is None or tries.digest != digest:
            tries = self._tries[model] = _Attempts(digest, now)
        return tries

"""Two candidates for one model: both are fetched and proved, one after the other, and the better one is kept.

While they are tried, the bundle that serves goes on serving. Nothing is switched before the choice, so that a roll-back
leads to what served before, never to the other candidate, which is removed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace

from kedge_agent.update.actions import Choice
from kedge_agent.update.model_update import ModelUpdate
from kedge_protocol import candidates
from kedge_protocol.candidates import Candidate
from kedge_protocol.messages import Desired, Failure, ReportedCandidate

NewUpdate = Callable[[str, str, int | None, Callable[[], None]], ModelUpdate]
"""Makes a model's update: name, digest, manifest's size, and what follows its proof in the place of a switch."""


@dataclass
class _Contest:
    """Two candidates under way, in their order; ``sizes`` of their manifests."""

    pair: tuple[str, str]
    sizes: Mapping[str, int]
    updates: dict[str, ModelUpdate] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)


class Contests:
    """The candidates of one machine's models.

    Args:
        remembered: what was chosen before a restart.
        new: makes a candidate's update and lets it be the model's.
        decided: called with a model, and the update that goes on: the chosen one, which is to be switched to, or the
            first one if both failed.
    """

    def __init__(
        self,
        remembered: Mapping[str, Choice],
        *,
        new: NewUpdate,
        decided: Callable[[str, ModelUpdate], None],
    ) -> None:
        self._choices = dict(remembered)
        self._open: dict[str, _Contest] = {}
        self._new = new
        self._decided = decided

    @property
    def choices(self) -> dict[str, Choice]:
        """Return what is to be remembered."""
        return dict(self._choices)

    @property
    def digests(self) -> set[str]:
        """Return the digests that garbage collection must keep."""
        updates = [update for contest in self._open.values() for update in contest.updates.values()]
        return set[str]().union(*(update.digests for update in updates))

    def take(self, desired: Desired, failed: Collection[str]) -> None:
        """Handle a new desired state: forget what it does not ask for, and choices that kept nothing.

        Args:
            failed: models whose bundles failed and are not asked for again: these choices stay.
        """
        self._choices = {
            name: one
            for name, one in self._choices.items()
            if (one.kept or name in failed) and desired.pair(name) == one.bundles
        }
        self._open = {name: one for name, one in self._open.items() if desired.pair(name) == one.pair}

    def is_open(self, name: str) -> bool:
        """Return whether a model's candidates are under way."""
        return name in self._open

    def begins(self, name: str, desired: Desired) -> bool:
        """Return whether two candidates are desired of which none was chosen yet."""
        return desired.pair(name) is not None and name not in self._choices

    def wanted(self, name: str, desired: Desired) -> str:
        """Return the bundle that a model is to have: the chosen one, or the only one."""
        choice = self._choices.get(name)
        return (choice.kept if choice is not None else None) or desired.models[name]

    def begin(self, name: str, desired: Desired) -> None:
        """Try the first candidate."""
        pair = desired.pair(name)
        if pair is not None:
            self._open[name] = _Contest(pair, desired.sizes)
            self._try(name, pair[0])

    def failed(self, update: ModelUpdate, failure: Failure) -> bool:
        """Handle a failed update; return whether it was a candidate, so that the other one is tried or kept."""
        contest = self._open.get(update.name)
        if contest is None:
            return False
        contest.failures[update.digest] = failure
        self._next(update.name, contest)
        return True

    def reported(self, name: str) -> tuple[ReportedCandidate, ...]:
        """Return what is reported of a model's candidates."""
        contest = self._open.get(name)
        if contest is not None:
            return _outcomes(contest, None)
        choice = self._choices.get(name)
        return () if choice is None else choice.candidates

    def first(self, name: str) -> str | None:
        """Return the first candidate's digest while a model's candidates are under way."""
        contest = self._open.get(name)
        return None if contest is None else contest.pair[0]

    def _try(self, name: str, digest: str) -> None:
        contest = self._open[name]
        update = self._new(name, digest, contest.sizes.get(digest), lambda: self._next(name, contest))
        contest.updates[digest] = update
        update.start()

    def _next(self, name: str, contest: _Contest) -> None:
        """Try the second candidate, or choose."""
        if self._open.get(name) is not contest:
            return
        if len(contest.updates) < len(contest.pair):
            self._try(name, contest.pair[1])
            return
        del self._open[name]
        kept = candidates.choose([_candidate(contest, digest) for digest in contest.pair])
        chosen = None if kept is None else contest.pair[kept]
        self._choices[name] = Choice(bundles=contest.pair, candidates=_outcomes(contest, chosen))
        update = contest.updates[chosen or contest.pair[0]]
        if chosen is None:
            update.failure = _both(contest)
        self._decided(name, update)


def _candidate(contest: _Contest, digest: str) -> Candidate:
    update = contest.updates[digest]
    latency = update.latency
    return Candidate(
        size=update.transfer_bytes,
        p50_ms=None if latency is None else latency.p50_ms,
        p95_ms=None if latency is None else latency.p95_ms,
        failed=digest in contest.failures,
        max_ms=update.max_ms,
    )


def _outcomes(contest: _Contest, kept: str | None) -> tuple[ReportedCandidate, ...]:
    return tuple(
        ReportedCandidate(
            digest=digest,
            latency=contest.updates[digest].latency,
            failure=contest.failures.get(digest),
            kept=digest == kept,
        )
        for digest in contest.pair
        if digest in contest.failures or (digest in contest.updates and contest.updates[digest].is_proved)
    )


def _both(contest: _Contest) -> Failure:
    first, second = (contest.failures[digest] for digest in contest.pair)
    return replace(first, reason=f"{first.reason}; the other candidate {second.stage}: {second.reason}")

"""Bundles that run beside the models' own: fetched and proved like them, and then run in place of a switch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from kedge_agent.update import actions, events
from kedge_agent.update.model_update import ModelUpdate, Step, UpdateContext
from kedge_protocol.messages import Desired, Failure, ReportedShadow, Shadow


class Shadows:
    """The shadows of one machine.

    Args:
        context: that of the models; failures of shadows are reported, and remembered nowhere.
    """

    def __init__(self, context: UpdateContext) -> None:
        self._shared = context
        self._context = replace(context, failed=lambda *_: context.changed())
        self._updates: dict[str, ModelUpdate] = {}
        self._wanted: dict[str, tuple[Shadow, str]] = {}
        """Model name → its shadow, and the digest that it runs beside."""

    def __iter__(self) -> Iterator[ModelUpdate]:
        return iter(self._updates.values())

    def at(self, *, now: float) -> None:
        """Take over the times of the models' context."""
        shared = self._shared
        self._context.now, self._context.disk_at, self._context.proofs_at = now, shared.disk_at, shared.proofs_at

    def work_towards(self, desired: Desired) -> bool:
        """Start and stop shadows until they are the desired ones. One that failed stays so until another is desired.

        Returns:
            Whether one was stopped, whose files nobody may need any more.
        """
        wanted = {name: (shadow, desired.models[name]) for name, shadow in desired.shadows.items()}
        gone = [name for name, one in self._wanted.items() if wanted.get(name) != one]
        for name in gone:
            self._updates.pop(name).stop()
            del self._wanted[name]
            self._context.emit(actions.StopShadow(name))
        for name, one in sorted(wanted.items()):
            if name not in self._wanted:
                self._wanted[name] = one
                self._start(name, *one)
        return bool(gone)

    def get(self, name: str) -> ModelUpdate | None:
        """Return a model's shadow, or None."""
        return self._updates.get(name)

    def by_key(self, key: str) -> ModelUpdate | None:
        """Return the shadow that fetches under this key, or None."""
        return next((update for update in self if update.key == key), None)

    def tick(self) -> None:
        """Handle the passage of time."""
        for update in self:
            update.tick(confirmed=True)

    def ended(self, event: events.ShadowEnded) -> None:
        """Handle the end of a shadow's process: it has failed."""
        update = self._updates.get(event.model)
        if update is not None and update.digest == event.digest and update.step is Step.SHADOW:
            update.fail("shadow", event.reason)

    def reported(self, name: str) -> ReportedShadow | None:
        """Return what is reported of a model's shadow."""
        update = self._updates.get(name)
        if update is None:
            return None
        state, detail = update.step.value
        return ReportedShadow(
            digest=update.digest, state=state, detail=_words(update.failure) or update.detail or detail
        )

    def _start(self, name: str, shadow: Shadow, beside: str) -> None:
        run: Callable[[], None] = lambda: self._context.emit(  # noqa: E731
            actions.StartShadow(
                model=name,
                digest=shadow.digest,
                beside=beside,
                share=shadow.share,
                memory_bytes=shadow.memory_bytes,
            )
        )
        update = ModelUpdate(self._context, name, shadow.digest, shadow.size, events.Installed(), run=run)
        self._updates[name] = update
        update.start()


def _words(failure: Failure | None) -> str | None:
    return None if failure is None else f"{failure.stage}: {failure.reason}"

"""A candidate: compression steps over the graph, then a quantization plan for one backend."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from kedge import steps as known_steps
from kedge_protocol import codec
from kedge_protocol.errors import ConfigError, MessageError
from kedge_targets.numerics import Plan, Precision, RangeMethod
from kedge_targets.target import BackendChoice


@dataclass(frozen=True, kw_only=True)
class StepChoice:
    """A step by name, with the options that differ from its defaults (plain data, as in a recipe)."""

    use: str
    options: dict[str, Any] = field(default_factory=dict)

    def checked(self) -> StepChoice:
        """Return the choice itself after checking it.

        Raises:
            ConfigError: there is no such step, or an option is unknown or of the wrong type.
        """
        self.made()
        return self

    def made(self) -> Any:
        """Return the step; raises like :meth:`checked`."""
        step = known_steps.find(self.use)
        where = f"recipe, step {self.use!r}"
        try:
            options = codec.structure(self.options, step.Options, where=where, strict=True)
        except (ConfigError, MessageError) as error:
            known = ", ".join(one.name for one in dataclasses.fields(step.Options))
            raise ConfigError(error.what, where=where, remedy=f"It knows {known}") from error
        return step(options)

    @property
    def said(self) -> str:
        """Return a short form for tables: ``prune-channels ratio=0.5``."""
        return " ".join([self.use, *(f"{name}={_short(value)}" for name, value in self.options.items())])


def named_teacher(steps: Iterable[StepChoice], *, where: str) -> str | None:
    """Return the teacher that steps name in their options.

    Args:
        where: the steps were given, for the error.

    Raises:
        ConfigError: they name several.
    """
    found = {str(step.options["teacher"]) for step in steps if step.options.get("teacher") is not None}
    if len(found) > 1:
        raise ConfigError(
            f"the steps name several teachers: {', '.join(sorted(found))}",
            where=where,
            remedy="Name one: it judges everything, so compile once for each",
        )
    return next(iter(found), None)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate of the search.

    Attributes:
        backend: one of the target's, with its options.
        why: why it is tried, for the report.
        reasons: layer → why the plan gives it its precision.
    """

    backend: BackendChoice
    plan: Plan
    steps: tuple[StepChoice, ...] = ()
    why: str = ""
    reasons: dict[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Return a short form for tables: ``prune-channels ratio=0.5 + distil + int8 (2 layers float32)``."""
        plan = self.plan
        text = plan.default.value
        details = []
        if plan.range_method is not RangeMethod.MIN_MAX:
            details.append(plan.range_method.value)
        for precision in Precision:
            if count := sum(one is precision for one in plan.layers.values()):
                details.append(f"{count} layer{'s' * (count > 1)} {precision.value}")
        if details:
            text += f" ({', '.join(details)})"
        return " + ".join([*(step.said for step in self.steps), text])

    @property
    def is_float(self) -> bool:
        """Return whether this is the float model itself: no step, no layer of lower precision."""
        return self.plan.precisions == {Precision.FLOAT32} and not self.steps

    @property
    def key(self) -> str:
        """Return sixteen hex digits that identify the candidate; ``why`` does not count."""
        content = {"backend": self.backend, "plan": self.plan, "steps": list(self.steps)}
        return hashlib.sha256(codec.encode(content)).hexdigest()[:16]

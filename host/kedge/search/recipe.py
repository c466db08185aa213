"""Recipes: the result of a search as a short TOML file that people read, edit and run again (``--recipe``).

::

    schema = 1
    seed = 0

    [[step]]                       # in this order, over the float graph
    use = "prune-channels"
    ratio = 0.5

    [quantize]                     # then the backend lowers it so
    precision = "int8"

    [target.rpi4.quantize]         # what is written for one target stands instead of the rest
    precision = "float16"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.options import values
from kedge.quantization.quantize_options import Quantize, of_plan
from kedge.search.candidate import Candidate, StepChoice
from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError, MessageError
from kedge_targets import registry
from kedge_targets.contract import Compiler
from kedge_targets.target import BackendChoice, Target

SCHEMA = 1
FILE = "recipe.toml"


def steps_of(entries: Sequence[Mapping[str, Any]]) -> Iterator[StepChoice]:
    """Yield a section's steps after checking them.

    Raises:
        ConfigError: a step or option is unknown.
    """
    for number, entry in enumerate(entries, start=1):
        use = entry.get("use")
        if not isinstance(use, str):
            raise ConfigError(f"step {number} does not say which step it is", where="recipe", remedy='Add use = "…"')
        options = {name: value for name, value in entry.items() if name != "use"}
        yield StepChoice(use=use, options=options).checked()


@dataclass(frozen=True, kw_only=True)
class Section:
    """What a recipe asks for on one target, or on all.

    Attributes:
        backend: one of the target's; None for its first.
        step: ``use`` and the step's options, in order.
    """

    backend: str | None = None
    step: tuple[dict[str, Any], ...] = ()
    quantize: Quantize = field(default_factory=Quantize)

    @property
    def steps(self) -> tuple[StepChoice, ...]:
        """Return the steps after checking them.

        Raises:
            ConfigError: a step or option is unknown.
        """
        return tuple(steps_of(self.step))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe file. ``target`` maps a target's name to the section that replaces the rest for it."""

    schema: int = SCHEMA
    seed: int | None = None
    step: tuple[dict[str, Any], ...] = ()
    quantize: Quantize | None = None
    backend: str | None = None
    target: dict[str, Section] = field(default_factory=dict)

    def section(self, target: str) -> Section | None:
        """Return the section for a target; None if the recipe does not mention it."""
        if target in self.target:
            return self.target[target]
        if self.quantize is None and not self.step:
            return None
        return Section(backend=self.backend, step=self.step, quantize=self.quantize or Quantize())

    def check(self) -> None:
        """Check every step.

        Raises:
            ConfigError: see :attr:`Section.steps`; or the schema is unknown.
        """
        if self.schema != SCHEMA:
            raise ConfigError(f"schema {self.schema} is not known", where="recipe", remedy=f"Write schema = {SCHEMA}")
        for section in (Section(step=self.step), *self.target.values()):
            section.steps  # noqa: B018 -- looked at for its errors


def read(path: Path) -> Recipe:
    """Read a recipe; unknown keys are errors.

    Raises:
        ConfigError: the file cannot be read or is not TOML; a key, step or option is unknown or of the wrong type.
    """
    where = f"recipe {path}"
    try:
        recipe = codec.structure(toml.read(path, ConfigError, where=where), Recipe, where=where, strict=True)
    except MessageError as error:
        raise ConfigError(error.what, where=where, remedy="See docs/compression.md for the form") from error
    try:
        recipe.check()
    except ConfigError as error:
        raise ConfigError(error.what, where=f"{path}: {error.where}", remedy=error.remedy) from error
    return recipe


def candidate(section: Section, target: Target) -> Candidate:
    """Return the candidate that a recipe describes for one target.

    Raises:
        ConfigError: the backend is not one of the target's, or does not support the plan.
        TargetError: see :func:`kedge_targets.registry.compiler`.
    """
    choice = _backend(section, target)
    return Candidate(
        backend=choice,
        steps=section.steps,
        plan=section.quantize.plan(registry.compiler(choice.name), target),
        why="the recipe asks for it",
    )


def _backend(section: Section, target: Target) -> BackendChoice:
    if section.backend is None:
        return target.backends[0]
    for choice in target.backends:
        if choice.name == section.backend:
            return choice
    raise ConfigError(
        f"{section.backend!r} is no backend of {target.name}",
        where="recipe",
        remedy=f"It has {', '.join(one.name for one in target.backends)}",
    )


def section_of(made: Candidate, compiler: Compiler, target: Target) -> Section:
    """Return the recipe section of a candidate, without the ranges that a step decides: the step decides them again."""
    bare = dataclasses.replace(made.plan, ranges={})
    return Section(
        backend=None if made.backend == target.backends[0] else made.backend.name,
        step=tuple({"use": step.use, **step.options} for step in made.steps),
        quantize=of_plan(bare, compiler.quantized_for(target)),
    )


def written(sections: Mapping[str, Section], *, seed: int, heading: Sequence[str] = ()) -> str:
    """Return a recipe as TOML, with the header lines as comments and without defaults."""
    import tomli_w

    document: dict[str, Any] = {"schema": SCHEMA, "seed": seed}
    document["target"] = {name: plain(section) for name, section in sections.items()}
    comments = "".join(f"# {line}".rstrip() + "\n" for line in heading)
    return comments + tomli_w.dumps(document)


def plain(section: Section) -> dict[str, Any]:
    """Return a section as plain TOML data without defaults."""
    made: dict[str, Any] = {}
    if section.backend is not None:
        made["backend"] = section.backend
    if section.step:
        made["step"] = [dict(entry) for entry in section.step]
    made["quantize"] = {"precision": section.quantize.precision.value} | values(section.quantize)
    return made

"""Recipes of decoders: how each target's was made, as a short TOML file that ``--recipe`` follows::

schema = 1
seed = 0

[target.intel-cpu]
backend = "openvino"           # without it, the faster by measurement

[[target.intel-cpu.step]]      # in this order, over the float decoder
use = "drop-layers"
count = 2

[target.intel-cpu.quantize]    # a scheme: see docs/generation.md
precision = "int4"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.compiler.decoders import steps as decoder_steps
from kedge.quantization import decoder_scheme
from kedge.quantization.decoder_scheme import Scheme
from kedge.search.candidate import StepChoice
from kedge.search.recipe import FILE as FILE
from kedge.search.recipe import SCHEMA, steps_of
from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError, MessageError


@dataclass(frozen=True, kw_only=True)
class DecoderSection:
    """What a recipe asks for on one target.

    Attributes:
        backend: one of the target's; None for the faster by measurement.
        step: ``use`` and the step's options, in order.
    """

    backend: str | None = None
    step: tuple[dict[str, Any], ...] = ()
    quantize: Scheme = field(default_factory=Scheme)

    @property
    def steps(self) -> tuple[StepChoice, ...]:
        """Return the steps after checking them.

        Raises:
            ConfigError: a step or option is unknown, or not for decoders.
        """
        found = tuple(steps_of(self.step))
        for step in found:
            decoder_steps.check(step)
        return found


@dataclass(frozen=True, kw_only=True)
class DecoderRecipe:
    """A recipe file: target's name → its section."""

    schema: int = SCHEMA
    seed: int = 0
    target: dict[str, DecoderSection] = field(default_factory=dict)

    def section(self, target: str) -> DecoderSection:
        """Return the section of a target.

        Raises:
            ConfigError: there is none.
        """
        if target not in self.target:
            raise ConfigError(
                f"says nothing about {target}",
                where="--recipe",
                remedy=f"It has {', '.join(sorted(self.target)) or 'no target'}; add a section, or leave it out",
            )
        return self.target[target]


def read(path: Path) -> DecoderRecipe:
    """Read a recipe; unknown keys are errors.

    Raises:
        ConfigError: the file cannot be read or is not TOML; a key, step or option is unknown or of the wrong type.
    """
    where = f"recipe {path}"
    try:
        found = codec.structure(toml.read(path, ConfigError, where=where), DecoderRecipe, where=where, strict=True)
    except MessageError as error:
        raise ConfigError(error.what, where=where, remedy="See docs/generation.md for the form") from error
    if found.schema != SCHEMA:
        raise ConfigError(f"schema {found.schema} is not known", where=where, remedy=f"Write schema = {SCHEMA}")
    for section in found.target.values():
        decoder_scheme.check(section.quantize, where=where)
        section.steps  # noqa: B018 -- looked at for its errors
    return found


def written(sections: Mapping[str, DecoderSection], *, name: str, version: str, seed: int) -> str:
    """Return a recipe as TOML, without what is the default."""
    import tomli_w

    document = {"schema": SCHEMA, "seed": seed, "target": {name: _plain(one) for name, one in sections.items()}}
    heading = f"# How {name} {version} was compressed. Edit it, and run it again with --recipe.\n"
    return heading + tomli_w.dumps(document)


def _plain(section: DecoderSection) -> dict[str, Any]:
    scheme, default = section.quantize, Scheme()
    changed = {
        one.name: value
        for one in dataclasses.fields(scheme)
        if (value := getattr(scheme, one.name)) != getattr(default, one.name)
    }
    quantize = {"precision": scheme.precision} | {
        name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()
    }
    made: dict[str, Any] = {} if section.backend is None else {"backend": section.backend}
    if section.step:
        made["step"] = [dict(entry) for entry in section.step]
    return {**made, "quantize": quantize}

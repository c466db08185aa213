"""What is tried on each target: the schemes, steps and budget that the options or a recipe say, and the backends."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, replace
from pathlib import Path

from kedge.compiler.decoders import recipe as recipes
from kedge.compiler.decoders import steps as decoder_steps
from kedge.compiler.decoders import teachers
from kedge.compiler.decoders.budget import Budget
from kedge.quantization import decoder_scheme
from kedge.quantization.decoder_scheme import Scheme
from kedge.search import recipe_args
from kedge.search.budget import size_bytes
from kedge.search.candidate import StepChoice
from kedge.search.effort import Effort
from kedge.search.options import CompileOptions
from kedge_protocol.errors import ConfigError, TargetError
from kedge_targets import registry
from kedge_targets.decoder.contract import DECODERS, EXPORTED
from kedge_targets.target import BackendChoice, Target

_PACE = "--min-tokens-per-second"
RATIO = 1.15
"""Allowed ratio of the perplexity to the float model's if no budget is given."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is tried on a target.

    Attributes:
        backend: the only one that is taken; None for the faster by measurement.
        seed: where the options give none.
        shared: whether all targets have the same steps.
        teacher: the model that a step names as its teacher.
    """

    schemes: tuple[Scheme, ...]
    steps: tuple[StepChoice, ...] = ()
    backend: str | None = None
    seed: int = 0
    shared: bool = True
    teacher: Path | None = None

    @property
    def one_decoder(self) -> bool:
        """Return whether all targets quantize the same float decoder."""
        return self.shared or not self.steps


def budget(options: CompileOptions) -> Budget:
    """Return the budget that the options set.

    Raises:
        ConfigError: a limit is invalid.
    """
    ratio, absolute = None, None
    if options.max_perplexity is not None:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)(x?)", options.max_perplexity.strip())
        if found is None or float(found[1]) <= 0:
            raise ConfigError(
                f"{options.max_perplexity!r} is no limit",
                where="--max-perplexity",
                remedy="Give 1.05x of the float model's, or a perplexity",
            )
        ratio, absolute = (float(found[1]), None) if found[2] else (None, float(found[1]))
    if options.max_perplexity is None and options.max_kl is None:
        ratio = RATIO
    for size, flag in ((options.max_size, "--max-size"), (options.max_memory, "--max-memory")):
        if size is not None:
            size_bytes(size, of=1 << 30, where=flag)  # the shares are of files that the worker reads
    return Budget(
        max_ratio=ratio,
        max_perplexity=absolute,
        max_kl=options.max_kl,
        max_size=options.max_size,
        max_memory=options.max_memory,
        min_pace=options.min_tokens_per_second,
    )


def check_limits(options: CompileOptions, asked: list[Target], kind: str) -> None:
    """Raise :class:`ConfigError` if a limit is set that this kind of model, or these targets, cannot be judged by."""
    if options.split is not None:
        for value, flag in ((options.max_memory, "--max-memory"), (options.min_tokens_per_second, _PACE)):
            if value is not None:
                raise ConfigError(
                    "has no place beside --split: the layers are cut by the devices' memory",
                    where=flag,
                    remedy="Leave it out",
                )
    if kind != DECODERS and options.choices is not None:
        raise ConfigError(f"is not for {kind} yet", where="--choices", remedy="Leave it out")
    if options.min_tokens_per_second is None:
        return
    if kind != DECODERS:
        raise ConfigError(f"is not for {kind} yet", where=_PACE, remedy="Leave it out")
    for target in asked:
        if target.processor.architecture != platform.machine():
            raise ConfigError(
                f"is measured on this machine ({platform.machine()}); {target.name} is {target.processor.architecture}",
                where=_PACE,
                remedy="Leave it out, and let a gate of the rollout watch the devices' own pace",
            )


def plans_of(options: CompileOptions, asked: list[Target], kind: str) -> dict[str, Plan]:
    """Return what is tried on each target: what the recipe says, or what the options say."""
    if options.recipe is None:
        steps = _steps(options)
        found = Plan(schemes=_schemes(options, kind), steps=steps, teacher=teachers.named(steps))
        plans = {target.name: found for target in asked}
    else:
        for value, flag in ((options.step, "--step"), (options.quantize, "--quantize"), (options.cache, "--cache")):
            if value:
                raise ConfigError(
                    "excludes --recipe", where=flag, remedy="Write it into the recipe, or leave the recipe out"
                )
        recipe = recipes.read(options.recipe)
        sections = {target.name: recipe.section(target.name) for target in asked}
        plans = {
            name: Plan(
                schemes=(one.quantize,),
                steps=one.steps,
                backend=one.backend,
                seed=recipe.seed,
                shared=False,
                teacher=teachers.named(one.steps),
            )
            for name, one in sections.items()
        }
        for one in plans.values():
            _check_kind(one.schemes[0], kind, where="--recipe")
    if kind != DECODERS and any(one.steps for one in plans.values()):
        raise ConfigError(f"is not for {kind} yet", where="--step", remedy="Leave it out")
    return plans


def _schemes(options: CompileOptions, kind: str) -> tuple[Scheme, ...]:
    if kind != DECODERS:
        return _plain_schemes(options, kind)
    if options.quantize is not None:
        found: tuple[Scheme, ...] = (decoder_scheme.parse(options.quantize),)
    else:
        found = (decoder_scheme.QUICK,) if options.effort is Effort.QUICK else decoder_scheme.LADDER
    if options.cache is None:
        return found
    if options.cache not in decoder_scheme.CACHES:
        known = ", ".join(decoder_scheme.CACHES)
        raise ConfigError(f"{options.cache!r} is not known", where="--cache", remedy=f"Known are {known}")
    return tuple(replace(scheme, cache=options.cache) for scheme in found)


def _steps(options: CompileOptions) -> tuple[StepChoice, ...]:
    recipe = recipe_args.parse_recipe(options.step, None)
    section = None if recipe is None else recipe.section("")
    found = () if section is None else section.steps
    for step in found:
        decoder_steps.check(step)
    return found


def _plain_schemes(options: CompileOptions, kind: str) -> tuple[Scheme, ...]:
    """Return the schemes of a model that learns nothing from calibration.

    Args:
        kind: for error messages.
    """
    if options.cache is not None:
        raise ConfigError(f"is not for {kind} yet", where="--cache", remedy="Leave it out")
    # The embedding of an exported decoder stays as it is.
    whole = kind != EXPORTED
    plain = Scheme(method="plain") if whole else Scheme(method="plain", embedding="float32")
    if options.quantize is None:
        ladder = tuple(replace(scheme, method="plain") for scheme in decoder_scheme.LADDER)
        if not whole:
            ladder = (plain, replace(plain, precision="int8"), replace(plain, precision="float32"))
        quick = next(scheme for scheme in ladder if scheme.precision == "int8")
        return (quick,) if options.effort is Effort.QUICK else ladder
    found = decoder_scheme.parse(options.quantize, plain)
    _check_kind(found, kind, where="--quantize")
    return (found,)


def _check_kind(scheme: Scheme, kind: str, *, where: str) -> None:
    """Raise :class:`ConfigError` if a scheme is not for this kind of model."""
    if kind == EXPORTED and (scheme.precision == "float16" or scheme.embedding != "float32" or scheme.int8_layers):
        raise ConfigError(f"{scheme.label!r} is not for {kind}", where=where, remedy="Give int8, int4 or float32")
    if kind != DECODERS and (scheme.learns or scheme.cache != "float32"):
        wrong = "method=gptq" if scheme.learns else f"cache={scheme.cache}"
        raise ConfigError(f"{wrong} is not for {kind} yet", where=where, remedy="Leave it out")


def routes(target: Target, kind: str, wanted: str | None) -> list[BackendChoice]:
    """Return the backends of a target that run this kind of model, in the target's order; those that are not usual only
    where no usual one does.

    Args:
        wanted: the only one that is taken; None for all.

    Raises:
        TargetError: there is none; the message says why.
        ConfigError: the wanted one is not among them.
    """
    found, objections = [], []
    for choice in target.backends:
        compiler = registry.compiler(choice.name)
        decoders = compiler.decoders()
        objection = compiler.no_decoders if decoders is None else decoders.objection(kind, choice.options)
        if objection:
            objections.append(objection)
        elif wanted in (None, choice.name):
            found.append(choice)
    if found:
        usual = [one for one in found if one.usual]
        return usual or found[:1]
    if wanted is not None:
        raise ConfigError(
            f"{wanted!r} is no backend of {target.name} that runs {kind}", where="--recipe", remedy="Leave it out"
        )
    raise TargetError(
        f"{target.name!r} runs no {kind}: {'; '.join(objections)}",
        remedy="Compile for a CPU: generic-arm (of a Jetson too), rpi4, rpi5, generic-cpu and intel-cpu run them",
    )

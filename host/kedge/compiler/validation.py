"""Validates the user's request before any work starts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kedge.evaluation import metric, user
from kedge.importing import model_kinds, transformers_folder
from kedge.importing.data_folders import kinds as data_kinds
from kedge.importing.data_folders.listing import encoding_of, lines_in
from kedge.search import budget, latency, option_ranges, recipe_args
from kedge.search import recipe as recipes
from kedge.search.candidate import named_teacher
from kedge.search.options import CompileOptions
from kedge.search.recipe import Recipe
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_protocol.bundle.write import check_place
from kedge_protocol.errors import (
    ConfigError,
    MissingDependencyError,
    ModelError,
    TargetError,
)
from kedge_protocol.packages import pip_install
from kedge_protocol.topics import checked_name
from kedge_targets import registry
from kedge_targets import target as targets
from kedge_targets.pipeline import declaration
from kedge_targets.target import Target

# What the extra brings and no backend looks for itself; ONNX Runtime is loaded in the worker, which says so.
_MODULES = ("onnx", "jinja2", "rich")


@dataclass(frozen=True, kw_only=True)
class ValidatedRequest:
    """A validated compilation request.

    Attributes:
        model: a path, or a factory (:mod:`kedge.importing.model_kinds`).
        pipeline: the pipeline as declared; what it leaves open is taken from the model later.
        is_onnx: whether the model needs no import.
        teacher: the model that a step of the recipe names, see :mod:`kedge.compiler.teachers`.
    """

    model: str
    is_onnx: bool
    options: CompileOptions
    targets: tuple[Target, ...]
    labels: tuple[str, ...]
    recipe: Recipe | None
    record: latency.LatencyLog
    pipeline: Pipeline | None = None
    teacher: str | None = None

    @property
    def raw_data(self) -> bool:
        """Return whether a data set is anything other than arrays, and columns that become arrays as they are."""
        options = self.options
        return any(
            data_kinds.is_raw(path) and self.columns_file(role) is None
            for role, path in (("calibration", options.calibration), ("evaluation", options.evaluation))
        )

    def columns_file(self, role: str) -> Path | None:
        """Return the table whose columns are the model's inputs; None where a pipeline takes it, or there is none."""
        if self.pipeline is not None:
            return None
        path = self.options.evaluation if role == "evaluation" else self.options.calibration
        return data_kinds.columns_file(path, role)

    @property
    def seed(self) -> int:
        """Return the seed: the option's, otherwise the recipe's, otherwise 0."""
        if self.options.seed is not None:
            return self.options.seed
        return self.recipe.seed if self.recipe is not None and self.recipe.seed is not None else 0

    @property
    def name(self) -> str:
        """The model's file name, without its folders."""
        return Path(self.model).name

    def budget(self, float_bytes: int) -> budget.Budget:
        """Return the limits on a bundle's cost.

        Args:
            float_bytes: the size of the user's file.

        Raises:
            ConfigError: ``--max-size`` is not a size.
        """
        size = self.options.max_size
        return budget.Budget(
            max_drop=self.options.max_drop,
            max_size=None if size is None else budget.size_bytes(size, of=float_bytes, where="--max-size"),
            max_latency=self.options.max_latency,
            min_agreement=self.options.min_agreement,
            confidence=self.options.confidence,
        )


def check(model: str, options: CompileOptions) -> ValidatedRequest:
    """Check everything that can be checked without reading the model.

    Args:
        model: the user's name for it; empty for an object, which has no name.

    Raises:
        InputError: an option, target or recipe is wrong (:class:`kedge_protocol.errors.ConfigError`, …).
        MissingDependencyError: this installation cannot compile.
        StorageError: OUT already exists, or is not something that --force replaces.
    """
    check_environment()
    kind = model_kinds.recognise(model, trust_pickle=options.trust_pickle) if model else None
    options.check_kind(language_model=False)
    asked = _targets(options)
    labels = _labels(options.labels)
    if kind is model_kinds.Kind.TRANSFORMERS:
        transformers_folder.check(Path(model))
    _check(options)
    recipe = _recipe(options)
    _check_requirements(options, asked)
    if recipe is not None:
        for target in asked:
            if (section := recipe.section(target.name)) is not None:
                recipes.candidate(section, target)
    return ValidatedRequest(
        model=model,
        is_onnx=kind in (model_kinds.Kind.ONNX, model_kinds.Kind.UNKNOWN),
        options=options,
        targets=tuple(asked),
        labels=labels,
        recipe=recipe,
        record=latency.LatencyLog() if options.latencies is None else latency.read(options.latencies),
        pipeline=_pipeline(options),
        teacher=_teacher(recipe, asked, trust_pickle=options.trust_pickle),
    )


def _teacher(recipe: Recipe | None, asked: Sequence[Target], *, trust_pickle: bool) -> str | None:
    """Return the teacher that the steps name."""
    sections = [] if recipe is None else [recipe.section(target.name) for target in asked]
    steps = [step for section in sections if section is not None for step in section.steps]
    source = named_teacher(steps, where="recipe")
    if source is None:
        return None
    try:
        model_kinds.recognise(source, trust_pickle=trust_pickle)
    except ModelError as error:
        raise ModelError(error.what, where=f"teacher {source}", remedy=error.remedy) from error
    return source


def check_environment() -> None:
    """Raise :class:`MissingDependencyError` if this Python or this installation cannot compile."""
    if sys.version_info < (3, 11):
        version = ".".join(map(str, sys.version_info[:2]))
        raise MissingDependencyError(
            f"compiling needs Python 3.11 or newer, this is {version}",
            remedy="Devices and controllers run on 3.10; compile on a machine with a newer Python",
        )
    missing = [name for name in _MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(
            f"compiling needs {', '.join(missing)}", remedy=f"Install it: {pip_install('compile')}"
        )


def _targets(options: CompileOptions) -> list[Target]:
    if not options.targets:
        raise TargetError("no target is given", remedy=f"Known are {', '.join(targets.names())}")
    found = [targets.find(name) for name in options.targets]
    names = [target.name for target in found]
    for name in names:
        if names.count(name) > 1:
            raise TargetError(f"{name!r} is given twice", where="--target")
    return found


def _labels(path: Path | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        lines = lines_in(path.read_text(encoding=encoding_of(path)))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or error) if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot be read: {reason}", where=f"--labels {path}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise ConfigError("holds no name", where=f"--labels {path}", remedy="Write one class name on each line")
    return names


def _check(options: CompileOptions) -> None:
    checked_name(options.name, "model name")
    checked_name(options.version, "version")
    option_ranges.check(options)
    if options.max_size is not None:
        budget.size_bytes(options.max_size, of=1 << 20, where="--max-size")
    _ = options.batch_axes, options.states
    if options.metric is not None:
        metric.check(options.metric)
    if options.loss is not None:
        user.check_reference(options.loss, where="--loss")
    check_place(options.out, replace=options.force)


def _pipeline(options: CompileOptions) -> Pipeline | None:
    if options.pipeline is None:
        return None if options.task is None else declaration.READY[options.task]
    if options.task is not None:
        raise ConfigError(
            "a pipeline's file and a task exclude each other", where="--task", remedy="Write the task into the file"
        )
    return declaration.read(options.pipeline)


def _recipe(options: CompileOptions) -> Recipe | None:
    inlined = recipe_args.parse_recipe(options.step, options.quantize)
    if options.recipe is None:
        return inlined
    if inlined is not None:
        raise ConfigError(
            "a recipe's file and steps on the command line exclude each other",
            where="--recipe",
            remedy="Write the steps into the recipe",
        )
    return recipes.read(options.recipe)


def _check_requirements(options: CompileOptions, asked: Sequence[Target]) -> None:
    """Reject an option that no backend of any target supports, since it would be silently ignored."""
    taken = {name for target in asked for one in target.backends for name in registry.compiler(one.name).requirements}
    for name in options.asked_of_backends():
        if name not in taken:
            raise ConfigError(
                "no backend of these targets takes it",
                where=f"--{name.replace('_', '-')}",
                remedy="Leave it out, or choose a target that does: see docs/targets.md",
            )

"""Compiles a decoder for each target in its own worker, and writes the release at the end."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kedge.compiler.decoders import part_releases, plans, report, splitting
from kedge.compiler.decoders import recipe as recipes
from kedge.compiler.decoders.budget import Budget
from kedge.compiler.decoders.worker_messages import Attempt, DecoderAnswer, DecoderRequest, Rival
from kedge.compiler.release import Release
from kedge.importing.decoders import exported, reading
from kedge.search import option_ranges
from kedge.search.options import CompileOptions
from kedge.search.results import ProgressCallback
from kedge_protocol import __version__, codec, digest
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle.write import check_place, new_layout
from kedge_protocol.errors import BudgetError, CompileError, InputError, KedgeError, TargetError
from kedge_protocol.topics import checked_name
from kedge_targets import registry
from kedge_targets import target as targets
from kedge_targets.decoder.contract import DECODERS, ENCODER_DECODERS, EXPORTED, PARTS
from kedge_targets.target import BackendChoice, Target
from kedge_targets.worker import Worker

TASK = "kedge.compiler.decoders.worker_tasks:compile_decoder"
GOLDEN = "golden.npz"


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    target: Target
    plan: plans.Plan
    answer: DecoderAnswer

    @property
    def backend(self) -> str:
        """Return the backend that was packed."""
        return self.answer.backend

    @property
    def section(self) -> recipes.DecoderSection:
        """Return how it was made, for the recipe."""
        answer = self.answer
        return recipes.DecoderSection(
            backend=answer.backend,
            step=tuple({"use": step.use, **step.options} for step in self.plan.steps),
            quantize=answer.attempts[answer.chosen].scheme,
        )


def run(
    model: Path, options: CompileOptions, scratch: Path, worker: Callable[[str], Worker], on_progress: ProgressCallback
) -> Release:
    """Compile a decoder; see :func:`kedge.compile`.

    Args:
        scratch: a folder that outlives the call.
        worker: makes a worker with this name.

    Raises:
        InputError: the model, a text, a target or an option is wrong.
        BudgetError: no scheme keeps the budget on any target.
        CompileError: no target could be compiled.
    """
    asked = [targets.find(name) for name in options.targets]
    _check(options, asked)
    kind = EXPORTED if exported.is_exported(model) else DECODERS
    if reading.has_encoder(model):
        kind = ENCODER_DECODERS
    holders: tuple[Target, ...] = ()
    limit, wanted = plans.budget(options), kind
    if options.split is not None:
        holders = splitting.devices(options.split, asked, kind=kind)
        splitting.check_places(options.name, options.out, len(holders), replace=options.force)
        asked, wanted = asked[:1], PARTS
    plans.check_limits(options, asked, kind)
    planned = plans.plans_of(options, asked, kind)
    compiled: list[_Compiled] = []
    failures: dict[str, KedgeError] = {}
    for target in asked:
        try:
            plan = planned[target.name]
            how = (plan, limit, plans.routes(target, wanted, plan.backend), holders)
            compiled.append(_one(model, target, options, how, scratch, worker, on_progress))
        except InputError as error:
            if len(asked) == 1 or not isinstance(error, TargetError):
                raise
            failures[target.name] = error
        except KedgeError as error:
            failures[target.name] = error
    if not compiled:
        if len(failures) == 1:
            raise next(iter(failures.values()))
        raise CompileError("no target could be compiled: " + "; ".join(f"{n}: {e}" for n, e in failures.items()))
    if holders:
        base = _configuration(compiled[0], options, {})
        return part_releases.write(options, holders, base, compiled[0].answer)
    _write(options, compiled, failures)
    return replace(Release.open(options.out), failures=failures)


def _check(options: CompileOptions, asked: list[Target]) -> None:
    options.check_kind(language_model=True)
    checked_name(options.name, "model name")
    checked_name(options.version, "version")
    if not asked:
        raise TargetError("no target is given", remedy=f"Known are {', '.join(targets.names())}")
    option_ranges.check(options)
    if options.split is None:
        check_place(options.out, replace=options.force)


def _one(
    model: Path,
    target: Target,
    options: CompileOptions,
    how: tuple[plans.Plan, Budget, list[BackendChoice], tuple[Target, ...]],
    scratch: Path,
    worker: Callable[[str], Worker],
    on_progress: ProgressCallback,
) -> _Compiled:
    plan, limit, (backend, *others), holders = how
    for other in holders:
        if plans.routes(other, PARTS, None)[0].name != backend.name:
            raise TargetError(f"{other.name!r} and {target.name!r} take other backends", where=splitting.WHERE)
    if holders or target.processor.architecture != platform.machine():
        others = []  # what is faster there cannot be measured here
    (workdir := scratch / target.name).mkdir()
    request = DecoderRequest(
        source=str(model.absolute()),
        adapter=None if options.adapter is None else str(options.adapter.absolute()),
        calibration=str(options.calibration.absolute()),
        evaluation=str(options.evaluation.absolute()),
        backend=backend.name,
        options=dict(backend.options),
        context=options.context,
        slots=options.slots or 1,
        rivals=tuple(Rival(backend=one.name, options=dict(one.options)) for one in others),
        schemes=plan.schemes,
        budget=limit,
        memory_bytes=target.system.memory_bytes,
        workdir=str(workdir.absolute()),
        steps=plan.steps,
        teacher=None if plan.teacher is None else str(plan.teacher),
        learned=str((scratch / "learned").absolute()) if plan.one_decoder and len(options.targets) > 1 else "",
        stepped=str(((scratch if plan.shared else workdir) / "stepped").absolute()),
        seed=plan.seed if options.seed is None else options.seed,
        split=tuple(holder.system.memory_bytes for holder in holders),
        choices=None if options.choices is None else str(options.choices.absolute()),
    )
    with worker(target.name) as child:
        answer = child.call(
            TASK,
            request,
            DecoderAnswer,
            deadline=options.deadline,
            on_progress=lambda what, done, total: on_progress(target.name, what, done, total),
        )
    _check_answer(answer, target, holders)
    return _Compiled(target=target, plan=plan, answer=answer)


def _check_answer(answer: DecoderAnswer, target: Target, holders: tuple[Target, ...]) -> None:
    """Raise :class:`BudgetError` if nothing keeps the budget, :class:`TargetError` if it takes too much memory."""
    if answer.chosen < 0:
        nearest = min(answer.attempts, key=lambda one: one.figures.kl)
        raise BudgetError(
            f"nothing keeps the budget; the nearest, {nearest.label}: {nearest.broken}",
            where=target.name,
            remedy=_remedy(nearest),
        )
    remedy = "Ask for less with --context, --slots or --cache int8"
    needs = [("needs", answer.memory_bytes, target)]
    if answer.parts:
        each = zip(answer.parts, holders, strict=True)
        remedy += ", or for more parts with --split"
        needs = [(f"part {at} needs", part.memory_bytes, one) for at, (part, one) in enumerate(each, 1)]
    for what, needed, one in needs:
        if needed > (there := one.system.memory_bytes):
            raise TargetError(
                f"{what} {needed >> 20} MiB of memory, the target has {there >> 20} MiB",
                where=one.name,
                remedy=remedy,
            )


def _remedy(nearest: Attempt) -> str:
    """Return what may be done about an attempt that does not keep the budget."""
    if nearest.outgrown:
        return "Allow more bytes; --context, --slots and --cache int8 take less memory, --step prunes"
    if nearest.slow:
        return "Ask for fewer tokens a second, or for less of the model with --step"
    return "Allow more with --max-perplexity or --max-kl"


def _write(options: CompileOptions, compiled: list[_Compiled], failures: dict[str, KedgeError]) -> None:
    with new_layout(options.out, replace=options.force) as writer:
        entries = []
        for one in compiled:
            answer = one.answer
            files = {title: Path(path) for title, path in answer.files.items()}
            descriptor = writer.add_bundle(_configuration(one, options, files), files, Path(answer.golden))
            entries.append(report.entry(answer, one.target.name, descriptor.digest))
        seed = compiled[0].plan.seed if options.seed is None else options.seed
        sections = {one.target.name: one.section for one in compiled}
        text = recipes.written(sections, name=options.name, version=options.version, seed=seed)
        (writer.path / recipes.FILE).write_text(text, encoding="utf-8")
        writer.add_release(options.name, options.version)
        warnings = dict.fromkeys(text for one in compiled for text in one.answer.warnings)
        report.write(
            report.DecoderReport(
                name=options.name,
                version=options.version,
                source_bytes=compiled[0].answer.source_bytes,
                targets=tuple(entries),
                warnings=tuple(warnings),
                failures={name: str(error) for name, error in failures.items()},
            ),
            writer.path,
        )


def _configuration(one: _Compiled, options: CompileOptions, files: dict[str, Path]) -> cfg.BundleConfig:
    answer = one.answer
    attempt = answer.attempts[answer.chosen]
    learned = attempt.scheme.calibrated
    decoders = registry.compiler(one.backend).decoders()
    verified = cfg.Verified.EXECUTED if decoders is None else decoders.verified
    return cfg.BundleConfig(
        schema_version=cfg.SCHEMA_VERSION,
        name=options.name,
        version=options.version,
        target=one.target.name,
        backend=one.backend,
        entry=answer.entry,
        precision=attempt.scheme.name,
        runtimes=answer.runtimes,
        runtime_options=dict(next(b for b in one.target.backends if b.name == one.backend).options),
        inputs=(_tensor("tokens", (None, None), "int64"),),
        outputs=(_tensor("logits", (None, None, answer.generation.vocabulary), "float32"),),
        metric=cfg.Metric(
            name="perplexity",
            value=attempt.figures.perplexity,
            reference=attempt.figures.reference,
            agreement=attempt.figures.agreement,
            samples=attempt.figures.tokens,
            measured_on=f"{answer.runtime}, {platform.machine()}",
        ),
        resources=cfg.Resources(
            storage_bytes=sum(path.stat().st_size for path in files.values()), memory_bytes=answer.memory_bytes
        ),
        provenance=cfg.Provenance(
            model_digest=answer.source_digest,
            calibration_digest=answer.calibration_digest if learned else None,
            evaluation_digest=answer.evaluation_digest,
            calibration_samples=answer.calibration_sequences if learned else 0,
            evaluation_samples=answer.evaluation_sequences,
            tools={**answer.tools, "kedge": __version__},
            options={
                **codec.unstructure(attempt.scheme),
                **({"steps": [{"use": one.use, **one.options} for one in answer.steps]} if answer.steps else {}),
            },
        ),
        verified=verified,
        golden=cfg.GoldenRef(
            file=GOLDEN,
            digest=digest.of_file(Path(answer.golden)),
            samples=answer.golden_vectors,
            kernel_sets=answer.kernel_sets,
        ),
        generation=answer.generation,
    )


def _tensor(name: str, shape: tuple[int | None, ...], dtype: str) -> cfg.TensorSpec:
    return cfg.TensorSpec(
        name=name, shape=shape, dtype=dtype, file=cfg.FileTensor(name=name, index=0, shape=shape, dtype=dtype)
    )

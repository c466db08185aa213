"""Compiles a decoder for each target in its own worker, and writes the release at the end."""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from kedge.compiler.decoders import part_releases, report, splitting
from kedge.compiler.decoders import steps as decoder_steps
from kedge.compiler.decoders.worker_messages import Budget, DecoderAnswer, DecoderRequest
from kedge.compiler.release import Release
from kedge.importing.decoders import exported, reading
from kedge.quantization import decoder_scheme
from kedge.quantization.decoder_scheme import Scheme
from kedge.search import recipe_args
from kedge.search.candidate import StepChoice
from kedge.search.effort import Effort
from kedge.search.options import CompileOptions
from kedge.search.results import ProgressCallback
from kedge_protocol import __version__, codec, digest
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle.write import check_place, new_layout
from kedge_protocol.errors import BudgetError, CompileError, ConfigError, InputError, KedgeError, TargetError
from kedge_protocol.topics import checked_name
from kedge_targets import registry
from kedge_targets import target as targets
from kedge_targets.target import BackendChoice, Target
from kedge_targets.worker import Worker

TASK = "kedge.compiler.decoders.worker_tasks:compile_decoder"
RATIO = 1.15
"""Allowed ratio of the perplexity to the float model's if no budget is given."""
GOLDEN = "golden.npz"
_EXPORTED = "exported decoders"


@dataclass(frozen=True, kw_only=True)
class _Compiled:
    target: Target
    backend: str
    answer: DecoderAnswer


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
    kind = _EXPORTED if exported.is_exported(model) else ""
    if reading.has_encoder(model):
        kind = "encoder-decoders"
    holders: tuple[Target, ...] = ()
    if options.split is not None:
        holders = splitting.devices(options.split, asked, kind=kind)
        splitting.check_places(options.name, options.out, len(holders), replace=options.force)
        asked = asked[:1]
    schemes, limit, chosen = _schemes(options, kind), budget(options), _steps(options)
    if chosen and kind:
        raise ConfigError(f"is not for {kind} yet", where="--step", remedy="Leave it out")
    compiled: list[_Compiled] = []
    failures: dict[str, KedgeError] = {}
    for target in asked:
        try:
            how = (schemes, limit, chosen, holders)
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
    checked_name(options.name, "model name")
    checked_name(options.version, "version")
    if not asked:
        raise TargetError("no target is given", remedy=f"Known are {', '.join(targets.names())}")
    for value, flag in ((options.context, "--context"), (options.slots, "--slots")):
        if value is not None and value < (16 if flag == "--context" else 1):
            raise ConfigError(f"{value} is too small", where=flag, remedy="Give positions from 16, slots from 1 up")
    for flag, other in (("--recipe", options.recipe), ("--max-latency", options.max_latency)):
        if other:
            raise ConfigError("is not for language models yet", where=flag, remedy="See docs/generation.md")
    if options.split is None:
        check_place(options.out, replace=options.force)


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
    if options.max_kl is not None and not (math.isfinite(options.max_kl) and options.max_kl >= 0):
        raise ConfigError(f"{options.max_kl} is no divergence", where="--max-kl", remedy="Give nats a token, from 0 up")
    if options.max_perplexity is None and options.max_kl is None:
        ratio = RATIO
    return Budget(max_ratio=ratio, max_perplexity=absolute, max_kl=options.max_kl)


def _schemes(options: CompileOptions, kind: str) -> tuple[Scheme, ...]:
    if kind:
        return _plain_schemes(options, kind)
    if options.quantize is not None:
        found: tuple[Scheme, ...] = (decoder_scheme.parse(options.quantize),)
    else:
        found = decoder_scheme.LADDER[1:2] if options.effort is Effort.QUICK else decoder_scheme.LADDER
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
    whole = kind != _EXPORTED
    plain = Scheme(method="plain") if whole else Scheme(method="plain", embedding="float32")
    if options.quantize is None:
        ladder = tuple(replace(scheme, method="plain") for scheme in decoder_scheme.LADDER)
        if not whole:
            ladder = (plain, replace(plain, precision="int8"), replace(plain, precision="float32"))
        quick = next(scheme for scheme in ladder if scheme.precision == "int8")
        return (quick,) if options.effort is Effort.QUICK else ladder
    found = decoder_scheme.parse(options.quantize, plain)
    if not whole and (found.precision == "float16" or found.embedding != "float32" or found.int8_layers):
        raise ConfigError(
            f"{options.quantize!r} is not for {kind}", where="--quantize", remedy="Give int8, int4 or float32"
        )
    if found.learns or found.cache != "float32":
        wrong = "method=gptq" if found.learns else f"cache={found.cache}"
        raise ConfigError(f"{wrong} is not for {kind} yet", where="--quantize", remedy="Leave it out")
    return (found,)


def _backend(target: Target) -> BackendChoice:
    for choice in (one for one in target.backends if one.usual):
        if registry.compiler(choice.name).decoders() is not None:
            return choice
    raise TargetError(
        f"no backend of {target.name!r} runs language models",
        remedy="Targets with ONNX Runtime do: see docs/generation.md",
    )


def _one(
    model: Path,
    target: Target,
    options: CompileOptions,
    how: tuple[tuple[Scheme, ...], Budget, tuple[StepChoice, ...], tuple[Target, ...]],
    scratch: Path,
    worker: Callable[[str], Worker],
    on_progress: ProgressCallback,
) -> _Compiled:
    backend = _backend(target)
    schemes, limit, chosen, holders = how
    for other in holders:
        if _backend(other).name != backend.name:
            raise TargetError(f"{other.name!r} and {target.name!r} take other backends", where=splitting.WHERE)
    workdir = scratch / target.name
    workdir.mkdir()
    request = DecoderRequest(
        source=str(model.absolute()),
        adapter=None if options.adapter is None else str(options.adapter.absolute()),
        calibration=str(options.calibration.absolute()),
        evaluation=str(options.evaluation.absolute()),
        backend=backend.name,
        options=dict(backend.options),
        context=options.context,
        slots=options.slots or 1,
        schemes=schemes,
        budget=limit,
        memory_bytes=target.system.memory_bytes,
        workdir=str(workdir.absolute()),
        steps=chosen,
        stepped=str((scratch / "stepped").absolute()),
        seed=options.seed or 0,
        split=tuple(holder.system.memory_bytes for holder in holders),
    )
    with worker(target.name) as child:
        answer = child.call(
            TASK,
            request,
            DecoderAnswer,
            deadline=options.deadline,
            on_progress=lambda what, done, total: on_progress(target.name, what, done, total),
        )
    if answer.chosen < 0:
        nearest = min(answer.attempts, key=lambda one: one.figures.kl)
        raise BudgetError(
            f"nothing keeps the budget; the nearest, {nearest.label}: {nearest.broken}",
            where=target.name,
            remedy="Allow more with --max-perplexity or --max-kl",
        )
    if answer.parts:
        part_releases.check_memory(holders, answer)
    elif answer.memory_bytes > target.system.memory_bytes:
        raise TargetError(
            f"needs {answer.memory_bytes >> 20} MiB of memory, the target has {target.system.memory_bytes >> 20} MiB",
            where=target.name,
            remedy="Ask for less with --context, --slots or --cache int8",
        )
    return _Compiled(target=target, backend=backend.name, answer=answer)


def _write(options: CompileOptions, compiled: list[_Compiled], failures: dict[str, KedgeError]) -> None:
    with new_layout(options.out, replace=options.force) as writer:
        entries = []
        for one in compiled:
            answer = one.answer
            files = {title: Path(path) for title, path in answer.files.items()}
            descriptor = writer.add_bundle(_configuration(one, options, files), files, Path(answer.golden))
            entries.append(
                report.DecoderEntry(
                    target=one.target.name,
                    backend=one.backend,
                    digest=descriptor.digest,
                    chosen=answer.chosen,
                    attempts=answer.attempts,
                    bytes=answer.attempts[answer.chosen].bytes,
                    memory_bytes=answer.memory_bytes,
                    context=answer.generation.context,
                    slots=answer.generation.slots,
                    position_bytes=answer.generation.position_bytes,
                    steps=answer.steps,
                )
            )
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
        verified=cfg.Verified.EXECUTED,
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

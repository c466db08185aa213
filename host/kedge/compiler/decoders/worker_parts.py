"""What compiling decoders and encoder-decoders have in common."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from kedge.compiler.decoders.worker_messages import (
    CONTEXT,
    Attempt,
    BackendPace,
    DecoderAnswer,
    DecoderRequest,
    DecoderStepEntry,
    PartAnswer,
)
from kedge.evaluation import golden as tolerances
from kedge.evaluation.decoders.choices import ChoiceFigures
from kedge.evaluation.decoders.figures import Figures
from kedge.importing.decoders.text import TextFiles
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol import golden
from kedge_protocol.bundle.generation import Generation
from kedge_protocol.errors import ConfigError, LoweringError, TargetError
from kedge_protocol.golden import Golden, Tolerance
from kedge_targets import registry
from kedge_targets.decoder import golden as vectors
from kedge_targets.decoder.contract import DecoderCompiler, LoweredDecoder
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.spec import Array
from kedge_targets.decoder.stages import Stage, StagedDecoder

Tried: TypeAlias = tuple[LoweredDecoder, Attempt]
"""The files of a scheme, and its figures."""

COPIES = 2
"""Copies of weights in memory: once as they are, once as the kernels want them."""
TOKENIZER = "tokenizer.json"
TEMPLATE = "chat_template.jinja"
_COLUMNS = 512
_FLOOR = 1e-4
"""Smallest tolerance of golden logits, relative to their standard deviation."""


def compiler_of(backend: str) -> DecoderCompiler:
    """Return a backend's compiler for decoders.

    Raises:
        TargetError: it has none.
    """
    found = registry.compiler(backend).decoders()
    if found is None:
        raise TargetError(f"{backend} runs no language models")
    return found


def suited(schemes: Sequence[Scheme], compiler: DecoderCompiler, *, where: str) -> tuple[Scheme, ...]:
    """Return the schemes that a backend's kernels take.

    Raises:
        LoweringError: they take none.
    """
    objections = [compiler.objection_to(one.precision, one.cache) for one in schemes]
    found = tuple(one for one, objection in zip(schemes, objections, strict=True) if not objection)
    if not found:
        raise LoweringError(objections[0], where=where, remedy="Leave --quantize and --cache out, or compile for a CPU")
    return found


def context_of(asked: int | None, own: int) -> int:
    """Return the number of positions of a slot.

    Raises:
        ConfigError: more are asked for than the model has.
    """
    if asked is not None and asked > own:
        raise ConfigError(
            f"{asked} positions are more than the model's {own}", where="--context", remedy=f"Give at most {own}"
        )
    return asked if asked is not None else min(own, CONTEXT)


def check_tokenizer(tokenizer: Any, text: TextFiles, vocabulary: int, *, where: str) -> None:
    """Raise :class:`ConfigError` if a tokenizer has tokens that the model does not have.

    Added tokens that no text needs are let alone: Gemma 3's tokenizer has one for pictures, its model of texts has not.
    """
    beyond = {at: one.content for at, one in tokenizer.get_added_tokens_decoder().items() if at >= vocabulary}
    template = text.template or ""
    needed = any(at in (text.begin_token, *text.end_tokens) or name in template for at, name in beyond.items())
    if needed or tokenizer.get_vocab_size(with_added_tokens=False) > vocabulary:
        raise ConfigError(
            f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {vocabulary}",
            where=where,
            remedy="Give the tokenizer of this very model",
        )


def columns_of(vocabulary: int, rows: int) -> Array:
    """Return the tokens whose logits are compared, int64 [rows, columns]."""
    wanted = np.unique(np.linspace(0, vocabulary - 1, _COLUMNS).astype(np.int64))
    return np.repeat(wanted[None], rows, axis=0)


def golden_file(
    request: DecoderRequest, lowered: LoweredDecoder, tokens: Array, columns: Array, sources: Array | None = None
) -> tuple[Path, tuple[str, ...]]:
    """Write golden vectors (see :mod:`kedge_targets.decoder.golden`), and return their file and the kernel sets.

    The tolerance follows from the largest deviation of any kernel set, and of one step of many positions from single
    steps.
    """
    sets = registry.runtime(request.backend).kernel_sets_for(request.options)
    runs = []
    for kernel_set in sets:
        session = opened(request, lowered, context=tokens.shape[1], kernel_set=kernel_set)
        runs.append(vectors.answers(session, tokens, columns, sources))
        session.close()
    path = Path(request.workdir) / "golden.npz"
    inputs = {"tokens": tokens, "columns": columns, **({} if sources is None else {"sources": sources})}
    save_vectors(path, inputs, runs, margin=compiler_of(request.backend).margin)
    return path, sets


def opened(
    request: DecoderRequest, lowered: LoweredDecoder, *, context: int, kernel_set: str | None = None
) -> DecoderSession:
    """Open a decoder that was lowered, with one slot; of a split one all parts together."""
    runtime = registry.runtime(request.backend)
    if not lowered.parts:
        entry = lowered.files[lowered.entry]
        return runtime.load_decoder(entry, request.options, slots=1, context=context, kernel_set=kernel_set)
    stages = [stage_of(request, part, context=context, kernel_set=kernel_set) for part in lowered.parts]
    return StagedDecoder(stages, slots=1, context=context)


def stage_of(request: DecoderRequest, part: LoweredDecoder, *, context: int, kernel_set: str | None) -> Stage:
    """Open a part of a decoder, with one slot."""
    load = registry.runtime(request.backend).load_stage
    return load(part.files[part.entry], request.options, kernel_set=kernel_set)(1, context)


def save_vectors(
    path: Path, inputs: Mapping[str, Array], runs: Sequence[Mapping[str, Array]], *, margin: float = 1.0
) -> None:
    """Write golden vectors whose tolerance follows from several runs.

    Args:
        margin: see :class:`kedge_targets.decoder.contract.DecoderCompiler`.
        runs: the outputs by kernel set, ``prefill`` and ``steps`` among them; the first are expected.
    """
    expected = runs[0]
    margin *= tolerances.MARGIN
    apart = golden.deviation(expected["prefill"][:, -vectors.STEPS :], expected["steps"])
    allowed = {}
    for name, value in expected.items():
        found = [apart, *(golden.deviation(value, other[name]) for other in runs[1:])]
        least = _FLOOR * float(value.std())
        allowed[name] = Tolerance(
            max(least * 4, margin * max(most for most, _ in found)),
            max(least, margin * max(rms for _, rms in found)),
        )
    golden.save(Golden(dict(inputs), dict(expected), allowed), path)


def text_files(text: TextFiles, workdir: Path) -> dict[str, Path]:
    """Write the files of a model's text side and return them by title."""
    found = {TOKENIZER: text.tokenizer}
    if text.template is not None:
        found[TEMPLATE] = text.template.encode()
    for title, raw in found.items():
        (workdir / title).write_bytes(raw)
    return {title: workdir / title for title in found}


def version_of(distribution: str) -> str:
    """Return an installed distribution's version."""
    return metadata.version(distribution)


def runtime_of(backend: str) -> str:
    """Return name and version of the first of a backend's runtimes that is installed."""
    for name in registry.runtime(backend).distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{name} {version_of(name)}"
    return backend


class SourceFiles(Protocol):
    """The user's files, as the answer names them, and the model's text side."""

    @property
    def source_digest(self) -> str:
        """Their digest."""

    @property
    def size_bytes(self) -> int:
        """Their size."""

    @property
    def text(self) -> TextFiles:
        """Tokenizer, template and special tokens."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """The data that a decoder was calibrated with and judged by: digests, and numbers of sequences."""

    calibration_digest: str
    evaluation_digest: str
    calibration: int
    evaluation: int


def attempt_of(
    request: DecoderRequest,
    scheme: Scheme,
    lowered: LoweredDecoder,
    figures: Figures,
    *,
    label: str,
    memory: int,
    source: SourceFiles,
    began: float,
) -> Attempt:
    """Return a scheme's attempt.

    Args:
        memory: bytes of files and caches.
        began: by :func:`time.perf_counter`.
    """
    size = sum(path.stat().st_size for path in lowered.files.values())
    whole = size + len(source.text.tokenizer) + len((source.text.template or "").encode())
    outgrown = request.budget.outgrown(size=whole, memory=memory, source=source.size_bytes)
    return Attempt(
        scheme=scheme,
        label=label,
        bytes=size,
        memory_bytes=memory,
        figures=figures,
        broken=", ".join(filter(None, [request.budget.broken(figures), outgrown])),
        outgrown=bool(outgrown),
        seconds=time.perf_counter() - began,
        backend=request.backend,
    )


def first_that_keeps(
    schemes: Sequence[Scheme], workdir: Path, tried: Callable[[Scheme, Path], Tried]
) -> tuple[list[Tried], bool]:
    """Try the schemes in order until one keeps the budget or all that follow are too large, and delete the files of
    those that do not; return all that were tried, and whether the last one keeps it.

    Args:
        tried: makes the files of a scheme in a folder that is not there yet, and judges them.
    """
    made: list[Tried] = []
    for at, scheme in enumerate(schemes):
        folder = workdir / f"scheme-{at}"
        made.append(tried(scheme, folder))
        if not made[-1][1].broken:
            return made, True
        if made[-1][1].outgrown:
            break
        if at + 1 < len(schemes):
            shutil.rmtree(folder)
    return made, False


def answer_of(
    request: DecoderRequest,
    source: SourceFiles,
    made: Sequence[Tried],
    *,
    keeps: bool,
    proof: tuple[Path, tuple[str, ...]],
    vectors: int,
    generation: Generation,
    data: Data,
    warnings: tuple[str, ...],
    steps: tuple[DecoderStepEntry, ...] = (),
    parts: tuple[PartAnswer, ...] = (),
    channels: int = 0,
    paces: tuple[BackendPace, ...] = (),
    written_per_second: float | None = None,
    choices: ChoiceFigures | None = None,
) -> DecoderAnswer:
    """Return the answer to a request, and write the files of the text side.

    Args:
        request: for the backend that is packed.
        made: all schemes that were tried; the last one's files are packed.
        proof: what :func:`golden_file` returned; it holds ``vectors`` vectors.
    """
    lowered = made[-1][0]
    own = {} if lowered.parts else lowered.files
    files = {**own, **text_files(source.text, Path(request.workdir))}
    path, sets = proof
    return DecoderAnswer(
        backend=request.backend,
        files={title: str(file) for title, file in files.items()},
        entry=lowered.entry,
        runtimes=lowered.runtimes,
        tools={**lowered.tools, "tokenizers": version_of("tokenizers")},
        generation=generation,
        attempts=tuple(attempt for _, attempt in made),
        chosen=len(made) - 1 if keeps else -1,
        golden=str(path),
        golden_vectors=vectors,
        kernel_sets=sets,
        source_digest=source.source_digest,
        source_bytes=source.size_bytes,
        calibration_digest=data.calibration_digest,
        evaluation_digest=data.evaluation_digest,
        calibration_sequences=data.calibration,
        evaluation_sequences=data.evaluation,
        runtime=runtime_of(request.backend),
        memory_bytes=weights_memory(lowered) + generation.cache_bytes,
        warnings=warnings,
        steps=steps,
        parts=parts,
        channels=channels,
        paces=paces,
        written_per_second=written_per_second,
        choices=choices,
    )


def weights_memory(lowered: LoweredDecoder) -> int:
    """Return the bytes that the files take when they are open."""
    return COPIES * sum(file.stat().st_size for file in lowered.files.values())


def memory_of(lowered: LoweredDecoder, context: int, slots: int) -> int:
    """Return the bytes of a decoder's files and caches."""
    return weights_memory(lowered) + slots * (context * lowered.position_bytes + lowered.window_bytes)


def generation_of(
    request: DecoderRequest,
    text: TextFiles,
    lowered: LoweredDecoder,
    *,
    architecture: str,
    vocabulary: int,
    context: int,
) -> Generation:
    """Return how the device generates with a decoder."""
    return Generation(
        architecture=architecture,
        context=context,
        slots=request.slots,
        vocabulary=vocabulary,
        position_bytes=lowered.position_bytes,
        window_bytes=lowered.window_bytes,
        tokenizer=TOKENIZER,
        template=None if text.template is None else TEMPLATE,
        begin_token=text.begin_token,
        end_tokens=text.end_tokens,
        special=text.special,
    )

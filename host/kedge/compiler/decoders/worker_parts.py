"""What compiling decoders and encoder-decoders have in common."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from kedge.compiler.decoders.worker_messages import CONTEXT, DecoderRequest
from kedge.evaluation import golden as tolerances
from kedge.importing.decoders.text import TextFiles
from kedge_protocol import golden
from kedge_protocol.errors import ConfigError, TargetError
from kedge_protocol.golden import Golden, Tolerance
from kedge_targets import registry
from kedge_targets.decoder import golden as vectors
from kedge_targets.decoder.contract import DecoderCompiler, LoweredDecoder
from kedge_targets.decoder.spec import Array

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


def check_tokenizer(tokenizer: Any, vocabulary: int, *, where: str) -> None:
    """Raise :class:`ConfigError` if a tokenizer has more tokens than the model."""
    if tokenizer.get_vocab_size() > vocabulary:
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
    runtime = registry.runtime(request.backend)
    sets = runtime.kernel_sets_for(request.options)
    runs = []
    for kernel_set in sets:
        entry, length = lowered.files[lowered.entry], tokens.shape[1]
        session = runtime.load_decoder(entry, request.options, slots=1, context=length, kernel_set=kernel_set)
        runs.append(vectors.answers(session, tokens, columns, sources))
        session.close()
    expected = runs[0]
    apart = golden.deviation(expected["prefill"][:, -vectors.STEPS :], expected["steps"])
    allowed = {}
    for name, value in expected.items():
        found = [apart, *(golden.deviation(value, other[name]) for other in runs[1:])]
        least = _FLOOR * float(value.std())
        allowed[name] = Tolerance(
            max(least * 4, tolerances.MARGIN * max(most for most, _ in found)),
            max(least, tolerances.MARGIN * max(rms for _, rms in found)),
        )
    path = Path(request.workdir) / "golden.npz"
    inputs = {"tokens": tokens, "columns": columns, **({} if sources is None else {"sources": sources})}
    golden.save(Golden(inputs, expected, allowed), path)
    return path, sets


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
    """Return name and version of a backend's runtime."""
    name = registry.runtime(backend).distributions[0]
    return f"{name} {version_of(name)}"

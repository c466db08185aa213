"""Compiles a decoder that was exported to ONNX: its graph stays, the weights of its products may be stored in codes."""

from __future__ import annotations

import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np

from kedge.compiler.decoders.worker_messages import CONTEXT, Attempt, DecoderAnswer, DecoderRequest
from kedge.compiler.decoders.worker_parts import (
    TEMPLATE,
    TOKENIZER,
    check_tokenizer,
    columns_of,
    compiler_of,
    context_of,
    golden_file,
    runtime_of,
    text_files,
    version_of,
)
from kedge.evaluation.decoders import texts
from kedge.evaluation.decoders.figures import Figures, Tally
from kedge.importing.decoders import exported
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.bundle.generation import Generation
from kedge_protocol.errors import ConfigError, TargetError
from kedge_targets import registry
from kedge_targets.decoder import rounding
from kedge_targets.decoder.contract import LoweredDecoder
from kedge_targets.decoder.rounding import Grid
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.worker import Progress

LENGTH = 256
EVALUATION = 12
_POSITIONS = 64
_GOLDEN = 4
_GOLDEN_LENGTH = 24
_KEPT = Scheme(precision="float32", method="plain", embedding="float32")


class ExportedCompilation:
    """The compilation of one exported decoder for one backend."""

    def __init__(self, request: DecoderRequest, progress: Progress) -> None:
        if request.adapter is not None:
            raise ConfigError("is not merged into a file", where="--adapter", remedy="Merge it before the export")
        self._request = request
        self._progress = progress
        self._workdir = Path(request.workdir)
        self._decoder = exported.read(Path(request.source))
        self._compiler = compiler_of(request.backend)
        own = self._decoder.context
        self._context = context_of(request.context, own) if own is not None else request.context or CONTEXT
        self._schemes = request.schemes if self._decoder.spec.roundable else (_KEPT,)

    def run(self) -> DecoderAnswer:
        """Compile; see :func:`kedge.compiler.decoders.worker_tasks.compile_decoder`."""
        request, decoder = self._request, self._decoder
        self._check_memory()
        tokenizer = texts.tokenizer(decoder.text.tokenizer, where=TOKENIZER)
        check_tokenizer(tokenizer, decoder.spec.vocabulary, where=request.source)
        found, digest = texts.read(Path(request.evaluation))
        sequences = texts.sequences(
            found,
            tokenizer,
            length=min(LENGTH, self._context),
            wanted=EVALUATION,
            begin=decoder.text.begin_token,
            where=request.evaluation,
        )
        made, keeps = self._search(sequences)
        lowered = made[-1][0]
        path, sets = self._golden(lowered, sequences)
        generation = self._generation(lowered)
        size = sum(file.stat().st_size for file in lowered.files.values())
        files = {**lowered.files, **text_files(decoder.text, self._workdir)}
        return DecoderAnswer(
            files={title: str(file) for title, file in files.items()},
            entry=lowered.entry,
            runtimes=lowered.runtimes,
            tools={**lowered.tools, "tokenizers": version_of("tokenizers")},
            generation=generation,
            attempts=tuple(one for _, one in made),
            chosen=len(made) - 1 if keeps else -1,
            golden=str(path),
            golden_vectors=min(_GOLDEN, len(sequences)),
            kernel_sets=sets,
            source_digest=decoder.source_digest,
            source_bytes=decoder.size_bytes,
            calibration_digest=digest,
            evaluation_digest=digest,
            calibration_sequences=0,
            evaluation_sequences=len(sequences),
            runtime=runtime_of(request.backend),
            memory_bytes=2 * size + generation.cache_bytes,
            warnings=self._warnings(),
        )

    def _warnings(self) -> tuple[str, ...]:
        found = []
        if not self._decoder.spec.roundable:
            found.append("no product of the file has a constant in float32: its weights stay as they are")
        if not self._decoder.text.end_tokens:
            found.append("the folder names no token that ends an answer: only the limit of tokens will")
        return tuple(found)

    def _check_memory(self) -> None:
        cache = self._decoder.spec.position_bytes * self._context * self._request.slots
        if cache > self._request.memory_bytes:
            raise TargetError(
                f"the caches of {self._request.slots} x {self._context} positions take {cache >> 20} MiB; the target "
                f"has {self._request.memory_bytes >> 20} MiB",
                where=self._request.source,
                remedy="Ask for less with --context or --slots",
            )

    def _lowered(self, scheme: Scheme, folder: Path) -> LoweredDecoder:
        folder.mkdir(parents=True)
        grid = Grid(bits=scheme.bits, group=scheme.group, symmetric=scheme.symmetric)
        rounded = partial(rounding.plain, grid=grid, search=scheme.bits == 4) if scheme.bits else None
        return self._compiler.lower_exported(self._decoder.path, self._decoder.spec, rounded, workdir=folder)

    def _loaded(self, lowered: LoweredDecoder) -> DecoderSession:
        length = min(LENGTH, self._context)
        entry = lowered.files[lowered.entry]
        return registry.runtime(self._request.backend).load_decoder(
            entry, self._request.options, slots=1, context=length
        )

    def _search(self, sequences: list[list[int]]) -> tuple[list[tuple[LoweredDecoder, Attempt]], bool]:
        """Try the schemes in order until one keeps the budget; delete the files of those that do not."""
        made: list[tuple[LoweredDecoder, Attempt]] = []
        reference = self._loaded(self._lowered(_KEPT, self._workdir / "float"))
        try:
            for at, scheme in enumerate(self._schemes):
                self._progress(scheme.label, at, len(self._schemes))
                began, folder = time.perf_counter(), self._workdir / f"scheme-{at}"
                lowered = self._lowered(scheme, folder)
                session = self._loaded(lowered)
                figures = judged(session, reference, sequences)
                session.close()
                attempt = Attempt(
                    scheme=scheme,
                    label=scheme.label if scheme.bits else "as it is",
                    bytes=sum(path.stat().st_size for path in lowered.files.values()),
                    figures=figures,
                    broken=self._request.budget.broken(figures),
                    seconds=time.perf_counter() - began,
                )
                made.append((lowered, attempt))
                if not attempt.broken:
                    return made, True
                if at + 1 < len(self._schemes):
                    shutil.rmtree(folder)
        finally:
            reference.close()
            shutil.rmtree(self._workdir / "float")
        return made, False

    def _golden(self, lowered: LoweredDecoder, sequences: list[list[int]]) -> tuple[Path, tuple[str, ...]]:
        length = min(_GOLDEN_LENGTH, self._context, *(len(one) for one in sequences))
        tokens = np.array([one[:length] for one in sequences[:_GOLDEN]], np.int64)
        return golden_file(self._request, lowered, tokens, columns_of(self._decoder.spec.vocabulary, len(tokens)))

    def _generation(self, lowered: LoweredDecoder) -> Generation:
        text = self._decoder.text
        return Generation(
            architecture=self._decoder.architecture,
            context=self._context,
            slots=self._request.slots,
            vocabulary=self._decoder.spec.vocabulary,
            position_bytes=lowered.position_bytes,
            tokenizer=TOKENIZER,
            template=None if text.template is None else TEMPLATE,
            begin_token=text.begin_token,
            end_tokens=text.end_tokens,
            special=text.special,
        )


def judged(session: DecoderSession, reference: DecoderSession, sequences: list[list[int]]) -> Figures:
    """Evaluate a session beside the file as it is; uses the first slots."""
    tally = Tally()
    for sequence in sequences:
        tally.begin()
        for one in (session, reference):
            one.truncate(0, 0)
        for first in range(0, len(sequence) - 1, _POSITIONS):
            last = min(first + _POSITIONS, len(sequence) - 1)
            own, true = (one.extend(0, sequence[first:last], keep=last - first) for one in (session, reference))
            tally.add(own, true, np.asarray(sequence[first + 1 : last + 1]))
    return tally.figures()

"""Compiles a decoder that was exported to ONNX: its graph stays, the weights of its products may be stored in codes."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from kedge.compiler.decoders.worker_messages import CONTEXT, DecoderAnswer, DecoderRequest
from kedge.compiler.decoders.worker_parts import (
    TOKENIZER,
    Data,
    Tried,
    answer_of,
    attempt_of,
    check_tokenizer,
    columns_of,
    compiler_of,
    context_of,
    first_that_keeps,
    generation_of,
    golden_file,
    memory_of,
)
from kedge.evaluation.decoders import texts
from kedge.evaluation.decoders.figures import Figures, Tally
from kedge.importing.decoders import exported
from kedge.quantization.decoder_scheme import Scheme
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
        check_tokenizer(tokenizer, decoder.text, decoder.spec.vocabulary, where=request.source)
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
        return answer_of(
            request,
            decoder,
            made,
            keeps=keeps,
            proof=self._golden(lowered, sequences),
            vectors=min(_GOLDEN, len(sequences)),
            generation=generation_of(
                request,
                decoder.text,
                lowered,
                architecture=decoder.architecture,
                vocabulary=decoder.spec.vocabulary,
                context=self._context,
            ),
            data=Data(calibration_digest=digest, evaluation_digest=digest, calibration=0, evaluation=len(sequences)),
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

    def _search(self, sequences: list[list[int]]) -> tuple[list[Tried], bool]:
        """Try the schemes beside the file as it is."""
        reference = self._loaded(self._lowered(_KEPT, self._workdir / "float"))

        def tried(scheme: Scheme, folder: Path) -> Tried:
            began = time.perf_counter()
            self._progress(scheme.label, self._schemes.index(scheme), len(self._schemes))
            lowered = self._lowered(scheme, folder)
            with closing(self._loaded(lowered)) as session:
                figures = judged(session, reference, sequences)
            label = scheme.label if scheme.bits else "as it is"
            memory = memory_of(lowered, self._context, self._request.slots)
            made = attempt_of(
                self._request,
                scheme,
                lowered,
                figures,
                label=label,
                memory=memory,
                source=self._decoder,
                began=began,
            )
            return lowered, made

        try:
            return first_that_keeps(self._schemes, self._workdir, tried)
        finally:
            reference.close()
            shutil.rmtree(self._workdir / "float")

    def _golden(self, lowered: LoweredDecoder, sequences: list[list[int]]) -> tuple[Path, tuple[str, ...]]:
        length = min(_GOLDEN_LENGTH, self._context, *(len(one) for one in sequences))
        tokens = np.array([one[:length] for one in sequences[:_GOLDEN]], np.int64)
        return golden_file(self._request, lowered, tokens, columns_of(self._decoder.spec.vocabulary, len(tokens)))


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

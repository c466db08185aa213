"""Compiles an encoder-decoder in the worker. The float model runs beside each scheme's, and writes the answers that the
user's data lack."""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kedge.compiler.decoders.worker_messages import DecoderAnswer, DecoderRequest
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
    golden_file,
    weights_memory,
)
from kedge.evaluation.decoders import pairs as examples
from kedge.evaluation.decoders import texts
from kedge.evaluation.decoders.pairs import Pair
from kedge.importing.decoders import reading
from kedge.importing.decoders.encoder_names import EncoderDecoderWeights
from kedge.quantization import encoder_decoder
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.bundle.generation import Generation, Source
from kedge_protocol.errors import ConfigError, ModelError, TargetError
from kedge_targets import registry
from kedge_targets.decoder.contract import LoweredDecoder
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.spec import Array
from kedge_targets.worker import Progress

TEXTS = 64
SOUNDS = 12
"""Largest numbers of texts and of sounds that are evaluated."""
_FEW = 200
_GOLDEN = 4
_GOLDEN_SOUNDS = 2
_GOLDEN_LENGTH = 16
_FLOAT = Scheme(precision="float32", embedding="float32", method="plain")


class EncoderDecoderCompilation:
    """The compilation of one encoder-decoder for one backend."""

    def __init__(self, request: DecoderRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        self._workdir = Path(request.workdir)
        adapter = None if request.adapter is None else Path(request.adapter)
        self._decoder = reading.read(Path(request.source), adapter=adapter)
        self._spec = self._decoder.spec
        self._compiler = compiler_of(request.backend)
        self._context = context_of(request.context, self._spec.context)
        source, weights = self._decoder.text.source, self._decoder.weights
        if source is None or not isinstance(weights, EncoderDecoderWeights):
            raise ModelError("has no encoder", where=request.source)
        self._source: Source = source
        self._weights = weights
        self._sound = source.speech is not None

    def run(self) -> DecoderAnswer:
        """Compile; see :func:`kedge.compiler.decoders.worker_tasks.compile_decoder`."""
        request, decoder = self._request, self._decoder
        self._check_schemes()
        self._check_memory()
        tokenizer = texts.tokenizer(decoder.text.tokenizer, where=f"{request.source}/{TOKENIZER}")
        # With two vocabularies one tokenizer has both.
        encoder = self._spec.encoder
        largest = max(self._spec.vocabulary, 0 if encoder is None else encoder.vocabulary)
        check_tokenizer(tokenizer, decoder.text, largest, where=request.source)
        # The float model takes as much memory as the user's files: it is opened, and not read layer by layer.
        reference = self._loaded(self._lowered(_FLOAT, self._workdir / "float"))
        try:
            found, digest = self._examples(request.evaluation, tokenizer, reference)
            made, keeps = self._search(found, reference)
        finally:
            reference.close()
            shutil.rmtree(self._workdir / "float")
        lowered = made[-1][0]
        return answer_of(
            request,
            decoder,
            made,
            keeps=keeps,
            proof=self._golden(lowered, found),
            vectors=min(self._golden_vectors, len(found)),
            generation=self._generation(lowered),
            data=Data(calibration_digest=digest, evaluation_digest=digest, calibration=0, evaluation=len(found)),
            warnings=self._warnings(found),
        )

    @property
    def _golden_vectors(self) -> int:
        return _GOLDEN_SOUNDS if self._sound else _GOLDEN

    def _check_schemes(self) -> None:
        for scheme in self._request.schemes:
            encoder = self._spec.encoder
            count = len(self._spec.layers) + (0 if encoder is None else encoder.layers)
            if any(index >= count for index in scheme.int8_layers):
                raise ConfigError(
                    f"layer {max(scheme.int8_layers)} is not among the model's {count}",
                    where="--quantize",
                    remedy=f"Give int8_layers from 0 to {count - 1}, the encoder's first",
                )

    def _check_memory(self) -> None:
        """Check, before the long work, that the smallest scheme and the caches fit into the target's memory."""
        spec, slots = self._spec, self._request.slots
        scheme = min(self._request.schemes, key=lambda one: one.bits or 16)
        weights = self._decoder.parameters * (scheme.bits or 16) // 8
        position = 2 * 4 * len(spec.layers) * spec.heads * spec.head_size
        cache = position * slots * (self._context + self._source.positions)
        if weights + cache > self._request.memory_bytes:
            raise TargetError(
                f"the weights take {weights >> 20} MiB at least and the caches of {slots} x ({self._context} + "
                f"{self._source.positions}) positions {cache >> 20} MiB; the target has "
                f"{self._request.memory_bytes >> 20} MiB",
                where=self._request.source,
                remedy="Ask for less with --context or --slots, or take a smaller model",
            )

    def _examples(self, path: str, tokenizer: Any, reference: DecoderSession) -> tuple[list[Pair], str]:
        ends = self._decoder.text.end_tokens
        if self._sound:
            found, digest = examples.of_sounds(Path(path), tokenizer, self._source, ends[:1], wanted=SOUNDS)
        else:
            found, digest = examples.of_texts(Path(path), tokenizer, self._source, wanted=TEXTS)
        most = min(examples.ANSWER, self._context - 4)
        answered = []
        for at, pair in enumerate(found):
            self._progress("float reference", at, len(found))
            answered.append(examples.answered(reference, pair, self._source, ends, most=most))
        return answered, digest

    def _lowered(self, scheme: Scheme, folder: Path) -> LoweredDecoder:
        folder.mkdir(parents=True)
        return encoder_decoder.lowered(
            self._spec,
            self._weights,
            self._compiler,
            scheme,
            context=self._context,
            workdir=folder,
            heard=lambda done, total: self._progress(scheme.label, done, total),
        )

    def _loaded(self, lowered: LoweredDecoder) -> DecoderSession:
        return registry.runtime(self._request.backend).load_decoder(
            lowered.files[lowered.entry], self._request.options, slots=1, context=self._context
        )

    def _search(self, pairs: list[Pair], reference: DecoderSession) -> tuple[list[Tried], bool]:
        def tried(scheme: Scheme, folder: Path) -> Tried:
            began = time.perf_counter()
            lowered = self._lowered(scheme, folder)
            with closing(self._loaded(lowered)) as session:
                self._progress(f"evaluate {scheme.label}", 0, 0)
                figures = examples.judged(session, reference, pairs)
            memory = weights_memory(lowered) + self._generation(lowered).cache_bytes
            made = attempt_of(
                self._request,
                scheme,
                lowered,
                figures,
                label=scheme.label,
                memory=memory,
                source=self._decoder,
                began=began,
            )
            return lowered, made

        return first_that_keeps(self._request.schemes, self._workdir, tried)

    def _golden(self, lowered: LoweredDecoder, pairs: list[Pair]) -> tuple[Path, tuple[str, ...]]:
        self._progress("golden vectors", 0, 0)
        some = pairs[: self._golden_vectors]
        length = min(_GOLDEN_LENGTH, self._context)
        # Short answers go round: what is computed matters, not what it says.
        tokens = np.stack([np.resize(np.array([*one.begin, *one.answer], np.int64), length) for one in some])
        sources: Array
        if self._sound:
            sources = np.stack([one.source for one in some]).astype(np.float16)
        else:
            shortest = min(len(one.source) for one in some)
            sources = np.stack([one.source[-shortest:] for one in some])
        return golden_file(self._request, lowered, tokens, columns_of(self._spec.vocabulary, len(some)), sources)

    def _generation(self, lowered: LoweredDecoder) -> Generation:
        text = self._decoder.text
        return Generation(
            architecture=self._spec.architecture,
            context=self._context,
            slots=self._request.slots,
            vocabulary=self._spec.vocabulary,
            position_bytes=lowered.position_bytes,
            tokenizer=TOKENIZER,
            end_tokens=text.end_tokens,
            special=text.special,
            source=replace(self._source, position_bytes=lowered.source_position_bytes),
            rules=text.rules,
        )

    def _warnings(self, pairs: list[Pair]) -> tuple[str, ...]:
        found = [*self._decoder.text.warnings]
        tokens = sum(len(pair.answer) for pair in pairs)
        if tokens < _FEW:
            found.append(f"only {tokens} tokens of answers: figures are guesswork; some hundred are usual")
        if not self._decoder.text.end_tokens:
            found.append("the folder names no token that ends an answer: only the limit of tokens will")
        return tuple(found)

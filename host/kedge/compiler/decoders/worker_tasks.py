"""The worker's task: compiles a decoder to one target's files, evaluated with the device's runtime."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kedge.compiler.decoders import backend_race, checks, part_files, splitting, steps, teachers
from kedge.compiler.decoders.float_model import FloatModel
from kedge.compiler.decoders.questions import Questions
from kedge.compiler.decoders.worker_messages import (
    Attempt,
    BackendPace,
    DecoderAnswer,
    DecoderRequest,
    DecoderStepEntry,
    PartAnswer,
)
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
    generation_of,
    golden_file,
    memory_of,
    opened,
    suited,
)
from kedge.evaluation.decoders import reference as references
from kedge.evaluation.decoders import texts
from kedge.evaluation.decoders.reference import Reference
from kedge.importing.decoders import exported, reading
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization import decoder_mixing
from kedge.quantization.decoder_layers import QuantizedLayers, correlations, table
from kedge.quantization.decoder_scheme import Scheme
from kedge.quantization.kept_pieces import Learned, LearnedLayers
from kedge_protocol.errors import LoweringError, MissingDependencyError, VerificationError
from kedge_targets.decoder.contract import DecoderCompiler, Ends, LoweredDecoder
from kedge_targets.decoder.plan import Pieces
from kedge_targets.decoder.spec import Array
from kedge_targets.worker import Progress

LENGTH = 256
"""Tokens of a sequence."""
CALIBRATION = 16
EVALUATION = 12
_GOLDEN = 4
_GOLDEN_LENGTH = 24
_HEAD_SEQUENCES = 4
"""About how many sequences of the calibration a head is rounded with: their positions are enough for its channels."""
_MIXED = 2
"""Largest number of schemes with unlike layers that are tried."""


def compile_decoder(request: DecoderRequest, progress: Progress) -> DecoderAnswer:
    """Compile a decoder in the worker.

    Raises:
        InputError: the model or a text is wrong.
        TargetError: the device has too little memory.
        MissingDependencyError: the ``generation`` extra is not installed.
        LoweringError: the backend refuses the model.
    """
    if exported.is_exported(Path(request.source)):
        from kedge.compiler.decoders.exported_tasks import ExportedCompilation

        return ExportedCompilation(request, progress).run()
    if reading.has_encoder(Path(request.source)):
        from kedge.compiler.decoders.encoder_decoder_tasks import EncoderDecoderCompilation

        return EncoderDecoderCompilation(request, progress).run()
    return _Compilation(request, progress).run()


@dataclass
class _Made:
    """The files and figures of one scheme on one backend.

    Attributes:
        damages: see :attr:`kedge.quantization.decoder_layers.QuantizedLayers.damages`.
        pieces: the same layers once more, for another backend.
    """

    lowered: LoweredDecoder
    attempt: Attempt
    damages: tuple[float, ...]
    pieces: Pieces


class _Compilation:
    def __init__(self, request: DecoderRequest, progress: Progress) -> None:
        self._request = request
        self._progress = progress
        self._workdir = Path(request.workdir)
        adapter = None if request.adapter is None else Path(request.adapter)
        self._decoder: Decoder = reading.read(Path(request.source), adapter=adapter)
        self._teacher = None if request.teacher is None else teachers.read(Path(request.teacher), self._decoder)
        self._compiler = compiler_of(request.backend)
        schemes = suited(request.schemes, self._compiler, where=request.source)
        self._request = replace(request, schemes=schemes)
        self._spec = self._decoder.spec
        self._context = context_of(request.context, self._spec.context)
        self._judge = self._float(self._teacher or self._decoder)
        self._learned = LearnedLayers(Path(request.learned or request.workdir), shared=bool(request.learned))
        self._calibration: list[list[int]] = []
        self._correlations: Array | None = None

    def run(self) -> DecoderAnswer:
        request, decoder = self._request, self._decoder
        steps.check_options(request.steps, self._spec)
        if not request.steps:  # they may make it smaller
            self._check()
        tokenizer = texts.tokenizer(decoder.text.tokenizer, where=f"{request.source}/{TOKENIZER}")
        check_tokenizer(tokenizer, decoder.text, self._spec.vocabulary, where=request.source)
        calibration, calibration_digest = self._sequences(request.calibration, tokenizer, CALIBRATION)
        evaluation, evaluation_digest = self._sequences(request.evaluation, tokenizer, EVALUATION)
        self._calibration = calibration
        questions = Questions(request, tokenizer, begin=decoder.text.begin_token, context=self._judge.context)
        reference = self._judge.answers(evaluation)
        questions.ask_float(self._judge)
        entries = self._stepped(tokenizer, reference)
        made, keeps = self._search(reference)
        paces = self._choose(made, reference) if keeps and request.rivals else ()
        pace = self._pace(made[-1], reference) if keeps and request.budget.min_pace is not None else None
        keeps = keeps and not made[-1].attempt.broken
        request, lowered = self._request, made[-1].lowered
        tokens, columns = self._golden_inputs(evaluation)
        return answer_of(
            request,
            decoder,
            [(one.lowered, one.attempt) for one in made],
            keeps=keeps,
            proof=golden_file(request, lowered, tokens, columns),
            vectors=len(tokens),
            generation=generation_of(
                request,
                decoder.text,
                lowered,
                architecture=self._spec.architecture,
                vocabulary=self._spec.vocabulary,
                context=self._context,
            ),
            data=Data(
                calibration_digest=calibration_digest,
                evaluation_digest=evaluation_digest,
                calibration=len(calibration),
                evaluation=len(evaluation),
            ),
            warnings=checks.warnings(
                calibration, evaluation, calibration_digest == evaluation_digest, decoder, few=4 * LENGTH
            ),
            steps=entries,
            parts=self._parts(made[-1], tokens, columns),
            channels=self._spec.hidden,
            paces=paces,
            written_per_second=pace,
            choices=questions.figures(request, lowered, self._progress) if keeps else None,
        )

    def _parts(self, made: _Made, tokens: Array, columns: Array) -> tuple[PartAnswer, ...]:
        if not made.lowered.parts:
            return ()
        return part_files.answers(self._request, made.lowered.parts, tokens, columns, context=self._context)

    def _stepped(self, tokenizer: Any, reference: Reference) -> tuple[DecoderStepEntry, ...]:
        """Run the steps: from here on the decoder is what they made of it."""
        request = self._request
        if not request.steps:
            return ()
        learned, _ = self._sequences(request.calibration, tokenizer, steps.SEQUENCES)
        self._decoder, entries = steps.stepped(
            self._decoder,
            request.steps,
            learned,
            reference,
            Path(request.stepped),
            request.seed,
            self._progress,
            self._teacher,
        )
        self._spec = self._decoder.spec
        self._check()
        return entries

    def _check(self) -> None:
        """Check, before the long work, that the layers are there, and that the smallest scheme and the caches fit."""
        checks.layers(self._request, len(self._spec.layers))
        scheme = min(self._request.schemes, key=lambda one: one.fewest_bits)
        if self._cuts(scheme):
            return
        weights = self._decoder.parameters * scheme.fewest_bits // 8
        checks.memory(
            self._request,
            scheme,
            context=self._context,
            weights=weights,
            cache=sum(self._caches(scheme)),
            source=self._decoder.size_bytes,
        )

    def _caches(self, scheme: Scheme) -> list[int]:
        """Return the bytes of each layer's caches, of all slots."""
        itemsize = 1 if scheme.cache == "int8" else self._compiler.cache_itemsize
        channels = self._spec.kv_heads * self._compiler.layout(self._spec).size
        positions = [self._compiler.cache_positions(kind, self._context) for kind in self._spec.layers]
        return [2 * itemsize * channels * count * self._request.slots for count in positions]

    def _cuts(self, scheme: Scheme) -> tuple[int, ...]:
        """Return where the layers are cut; nowhere for a model that stays whole."""
        if not self._request.split:
            return ()
        return splitting.cuts(
            self._spec,
            scheme,
            self._request.split,
            caches=self._caches(scheme),
            where=self._request.source,
        )

    def _sequences(self, path: str, tokenizer: Any, wanted: int) -> tuple[list[list[int]], str]:
        found, digest = texts.read(Path(path))
        length = min(LENGTH, self._judge.context)
        begin = self._decoder.text.begin_token
        return texts.sequences(found, tokenizer, length=length, wanted=wanted, begin=begin, where=path), digest

    @property
    def _model(self) -> FloatModel:
        """Return the decoder as the steps have left it so far."""
        return self._float(self._decoder)

    def _float(self, decoder: Decoder) -> FloatModel:
        return FloatModel(
            decoder=decoder,
            compiler=self._compiler,
            context=min(self._context, decoder.spec.context),
            progress=self._progress,
        )

    def _search(self, reference: Reference) -> tuple[list[_Made], bool]:
        """Try the schemes in order until one keeps the budget; delete the files of those that do not.

        Before a scheme with more bits in every layer, schemes with more bits in some layers are tried.
        """
        made: list[_Made] = []
        todo = list(self._request.schemes)
        mixed = 0
        while todo:
            scheme = todo.pop(0)
            folder = self._workdir / f"scheme-{len(made)}"
            folder.mkdir(parents=True)
            again = bool(self._request.rivals) or (bool(todo) and scheme.same_layers(todo[0]))
            one = self._made(scheme, self._pieces(scheme, again=again), reference, folder)
            made.append(one)
            if not one.attempt.broken:
                return made, True
            if one.attempt.outgrown:
                break
            if todo and todo[0].bits != scheme.bits and mixed < _MIXED:
                excess = self._request.budget.excess(one.attempt.figures)
                if (other := decoder_mixing.with_more_bits(scheme, one.damages, excess)) is not None:
                    todo.insert(0, other)
                    mixed += 1
            if todo:
                shutil.rmtree(folder)
        return made, False

    def _pieces(self, scheme: Scheme, *, again: bool) -> Learned:
        """Return the layers of a scheme; see :meth:`kedge.quantization.kept_pieces.LearnedLayers.of`."""
        layers = self._layers(scheme, self._model.embedded(self._calibration) if scheme.calibrated else [])
        form = (self._compiler.layout(self._spec), self._context)
        return self._learned.of(scheme, layers, form=form, again=again)

    def _made(self, scheme: Scheme, learned: Learned, reference: Reference, folder: Path) -> _Made:
        lowered, attempt = self._tried(self._request, scheme, learned.pieces, reference, folder)
        if learned.kept is not None:
            learned.kept.finish(learned.damages)
        once_more: Pieces = lambda index: self._layers(scheme, [])(index)  # noqa: E731 -- one of two
        again = once_more if learned.kept is None else learned.kept.again
        return _Made(lowered, attempt, tuple(learned.damages), again)

    def _layers(self, scheme: Scheme, calibration: list[Array]) -> QuantizedLayers:
        return QuantizedLayers(
            self._model.layers,
            scheme,
            calibration,
            lambda done, total: self._progress(scheme.label, done, total),
        )

    def _tried(
        self, request: DecoderRequest, scheme: Scheme, pieces: Pieces, reference: Reference, folder: Path
    ) -> Tried:
        """Pack a scheme for the request's backend and judge it."""
        began = time.perf_counter()
        compiler = compiler_of(request.backend)
        suited([scheme], compiler, where=request.source)
        lowered = self._lowered(compiler, scheme, pieces, folder)
        session = opened(request, lowered, context=LENGTH)
        try:
            figures = references.judged(
                session, reference, lambda done, total: self._progress(f"evaluate {scheme.label}", done, total)
            )
        finally:
            session.close()
        label = " + ".join([*(step.said for step in request.steps), scheme.label])
        memory = memory_of(lowered, self._context, request.slots)
        made = attempt_of(
            request,
            scheme,
            lowered,
            figures,
            label=label,
            memory=memory,
            source=self._decoder,
            began=began,
        )
        return lowered, made

    def _lowered(self, compiler: DecoderCompiler, scheme: Scheme, pieces: Pieces, folder: Path) -> LoweredDecoder:
        spec, ends, context, cuts = self._spec, self._ends(scheme), self._context, self._cuts(scheme)
        if not cuts:
            return compiler.lower(spec, ends, pieces, context=context, workdir=folder)
        return part_files.joined(compiler.lower_parts(spec, ends, pieces, cuts, context=context, workdir=folder))

    def _choose(self, made: list[_Made], reference: Reference) -> tuple[BackendPace, ...]:
        """Pack what keeps the budget for the other backends too; the fastest one's files come last in ``made``, and the
        request is for it from here on."""
        first = made.pop()
        requests = {self._request.backend: self._request}
        packed = {self._request.backend: first}
        refused: list[BackendPace] = []
        for rival in self._request.rivals:
            request = replace(self._request, backend=rival.backend, options=rival.options)
            self._progress(f"pack for {rival.backend}", 0, 0)
            folder = self._workdir / rival.backend
            folder.mkdir()
            try:
                lowered, attempt = self._tried(request, first.attempt.scheme, first.pieces, reference, folder)
            except (LoweringError, VerificationError, MissingDependencyError) as error:
                refused.append(BackendPace(backend=rival.backend, refused=str(error)))
                continue
            one = _Made(lowered, attempt, (), first.pieces)
            if reason := attempt.broken or self._too_large(lowered):
                made.append(one)
                refused.append(BackendPace(backend=rival.backend, refused=reason))
                continue
            requests[rival.backend], packed[rival.backend] = request, one
        paces = backend_race.measured(
            {name: (one.lowered, requests[name]) for name, one in packed.items()},
            reference.sequences[0],
            context=self._context,
            heard=lambda: self._progress("compare backends", 0, 0),
        )
        best = backend_race.fastest(paces).backend
        made += [one for name, one in packed.items() if name != best] + [packed[best]]
        self._request, self._compiler = requests[best], compiler_of(best)
        return (*paces, *refused)

    def _pace(self, made: _Made, reference: Reference) -> float:
        """Return the tokens a second that one sequence is written at; an attempt that is too slow says so. Schemes with
        more bits would be slower still."""
        self._progress("measure the pace", 0, 0)
        pace = backend_race.alone(made.lowered, self._request, reference.sequences[0], context=self._context)
        broken = self._request.budget.slow(pace.written_per_second)
        made.attempt = replace(made.attempt, broken=broken, slow=bool(broken))
        return pace.written_per_second

    def _too_large(self, lowered: LoweredDecoder) -> str:
        needed = memory_of(lowered, self._context, self._request.slots)
        most = self._request.memory_bytes
        return "" if needed <= most else f"needs {needed >> 20} MiB of memory, the target has {most >> 20} MiB"

    def _ends(self, scheme: Scheme) -> Ends:
        weights, tied = self._decoder.weights, self._spec.tied
        inputs = self._head_inputs() if scheme.learns and scheme.embedding_bits == 4 else None
        return Ends(
            embedding=table(weights.outer("embedding"), scheme, inputs if tied else None),
            positions=weights.outer("positions") if self._spec.learned_positions else None,
            norm=self._model.norm,
            head=None if tied else table(weights.outer("head"), scheme, inputs),
        )

    def _head_inputs(self) -> Array:
        """Return the correlations of the head's inputs over some calibration texts."""
        if self._correlations is None:
            some = self._calibration[:: max(len(self._calibration) // _HEAD_SEQUENCES, 1)]
            self._correlations = correlations(np.concatenate(self._model.before_head(some, "inputs of the head")))
        return self._correlations

    def _golden_inputs(self, sequences: list[list[int]]) -> tuple[Array, Array]:
        """Return tokens of the evaluation texts, and the tokens whose logits are compared."""
        self._progress("golden vectors", 0, 0)
        length = min(_GOLDEN_LENGTH, self._context, *(len(one) for one in sequences))
        tokens = np.array([one[:length] for one in sequences[:_GOLDEN]], np.int64)
        return tokens, columns_of(self._spec.vocabulary, len(tokens))

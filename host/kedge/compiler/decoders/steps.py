"""Runs compression steps over a float decoder, and measures the decoder after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kedge import steps as known_steps
from kedge.compiler.decoders.worker_messages import DecoderStepEntry
from kedge.evaluation.decoders.figures import Figures, Tally
from kedge.evaluation.decoders.reference import Reference
from kedge.importing.decoders.decoder import Decoder
from kedge.search.candidate import StepChoice
from kedge.steps.decoder_step import DecoderContext, DecoderStep
from kedge_protocol import codec
from kedge_protocol.errors import ConfigError
from kedge_targets.decoder.spec import Array, DecoderSpec

if TYPE_CHECKING:
    from kedge.training.decoder.weights import HeldDecoder

Progress = Callable[[str, int, int], None]

SEQUENCES = 512
"""Sequences of the calibration texts that steps see, at most."""


def check(choice: StepChoice) -> None:
    """Check that a step works on language models.

    Raises:
        ConfigError: it does not.
    """
    if not issubclass(known_steps.find(choice.use), DecoderStep):
        able = ", ".join(name for name in known_steps.names() if issubclass(known_steps.find(name), DecoderStep))
        raise ConfigError("is not for language models", where=f"--step {choice.use}", remedy=f"Steps that are: {able}")


def check_options(choices: Sequence[StepChoice], spec: DecoderSpec) -> None:
    """Check the options of all steps against the decoder as the steps before leave it.

    Raises:
        ConfigError: an option does not fit.
    """
    for choice in choices:
        spec = choice.made().check_decoder(spec)


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """What the folder of the steps says beside the weights."""

    entries: tuple[DecoderStepEntry, ...]
    intermediate: int
    heads: int
    kv_heads: int
    origins: tuple[int, ...]


def stepped(
    decoder: Decoder,
    choices: Sequence[StepChoice],
    sequences: Sequence[Sequence[int]],
    reference: Reference,
    folder: Path,
    seed: int,
    progress: Progress,
    teacher: Decoder | None = None,
) -> tuple[Decoder, tuple[DecoderStepEntry, ...]]:
    """Return the decoder after the steps, and the effect of each. The next target finds it in ``folder``.

    Args:
        sequences: tokens of the calibration texts, of one length.
        reference: the float decoder's answers to the evaluation texts, or the teacher's.
        teacher: what a step names as such.

    Raises:
        StepError, ConfigError: see the steps.
    """
    if (folder / "entries.json").is_file():
        return _loaded(decoder, folder)
    whole, other = _held(decoder), None if teacher is None else _held(teacher)
    current, entries = whole, []
    for choice in choices:
        began = time.perf_counter()
        context = DecoderContext(
            float_model=whole, teacher=other, sequences=sequences, seed=seed, progress=_named(progress, choice.use)
        )
        if teacher is not None and choice.options.get("teacher") is not None:
            context.notes.append(f"{choice.use}: the teacher, {teacher.source_digest}, judges instead of the model")
        step = choice.made()
        current = step.apply_to_decoder(current, context)
        entries.append(
            DecoderStepEntry(
                use=choice.use,
                options=choice.options,
                parameters=current.parameters,
                figures=_judged(current, reference),
                seconds=time.perf_counter() - began,
                measured=context.figures,
                notes=tuple(context.notes),
            )
        )
    spec = current.spec
    stored = _Stored(
        entries=tuple(entries),
        intermediate=spec.intermediate,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        origins=current.origins,
    )
    _store(current.weights.outside, current.weights.layers, stored, folder)
    made = replace(decoder, spec=spec, weights=current.weights, parameters=current.parameters)
    return made, stored.entries


def _held(decoder: Decoder) -> HeldDecoder:
    from kedge.training.decoder.weights import held

    return held(decoder.spec, decoder.weights, norm_bias=decoder.weights.has_bias("norm"))


def _judged(decoder: HeldDecoder, reference: Reference) -> Figures:
    import torch

    from kedge.training.decoder.network import DecoderNetwork

    network, tally = DecoderNetwork(decoder), Tally()
    with torch.no_grad():
        for at, sequence in enumerate(reference.sequences):
            tally.begin()
            logits = network(torch.tensor([sequence[:-1]])).logits[0].numpy()
            tally.add(logits, reference.logits(at, 0, len(sequence) - 1), np.asarray(sequence[1:]))
    return tally.figures()


def _named(progress: Progress, use: str) -> Progress:
    return lambda what, done, total: progress(f"{use} {what}", done, total)


def _store(outside: Mapping[str, Array], layers: Sequence[Mapping[str, Array]], stored: _Stored, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"outside/{name}": array for name, array in outside.items()}
    arrays |= {f"{index}/{name}": array for index, layer in enumerate(layers) for name, array in layer.items()}
    with (folder / "weights.npz").open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    (folder / "entries.json").write_bytes(codec.encode(stored))


def _loaded(decoder: Decoder, folder: Path) -> tuple[Decoder, tuple[DecoderStepEntry, ...]]:
    from kedge.training.decoder.weights import HeldWeights

    where = folder / "entries.json"
    stored = codec.decode(where.read_bytes(), _Stored, where=str(where))
    outside: dict[str, Array] = {}
    layers: list[dict[str, Array]] = [{} for _ in stored.origins]
    with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
        for key in arrays.files:
            place, _, name = key.partition("/")
            (outside if place == "outside" else layers[int(place)])[name] = arrays[key]
    parameters = sum(array.size for held in (outside, *layers) for array in held.values())
    made = replace(
        decoder,
        spec=_spec(decoder.spec, stored),
        weights=HeldWeights(outside=outside, layers=layers),
        parameters=parameters,
    )
    return made, stored.entries


def _spec(spec: DecoderSpec, stored: _Stored) -> DecoderSpec:
    return replace(
        spec,
        intermediate=stored.intermediate,
        heads=stored.heads,
        kv_heads=stored.kv_heads,
        layers=tuple(spec.layers[index] for index in stored.origins),
    )

"""The text side of an encoder-decoder: what its encoder reads, how its answers begin, and what they must not hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedge.importing.decoders import text
from kedge.importing.decoders.text import TextFiles
from kedge_protocol.bundle.generation import AnswerRules, Source, Speech
from kedge_protocol.errors import ModelError
from kedge_targets.decoder.spec import SOUND, DecoderSpec, EncoderSpec

_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_ONE_LANGUAGE = 51864
"""Size of the vocabulary of OpenAI's models for English alone, whose tokenizers know all languages too."""
_FEATURES = {"sampling_rate": 16000, "n_fft": 400, "hop_length": 160}


def of_folder(folder: Path, config: Mapping[str, Any], spec: DecoderSpec) -> TextFiles:
    """Read the text side of a folder.

    Raises:
        ModelError: there is no tokenizer.json, a file is damaged, or no token begins an answer.
    """
    encoder = spec.encoder
    if encoder is None:
        raise ModelError("has no encoder", where=str(folder))
    plain = text.of_folder(folder, config)
    generation = {**_set(config), **_set(text.optional(folder / "generation_config.json"))}
    where = str(folder / "config.json")
    start = text.numbers(generation.get("decoder_start_token_id"))
    if len(start) != 1:
        raise ModelError("the key 'decoder_start_token_id' is missing", where=where)
    forced = text.numbers(generation.get("forced_bos_token_id"))
    speech = _speech(folder, plain, generation, encoder, spec.vocabulary) if encoder.kind == SOUND else None
    tasks = generation.get("task_specific_params") or {}
    source = Source(
        positions=encoder.context,
        position_bytes=0,
        begin_tokens=(*start, *forced) if speech is None else (start[0],),
        end_token=plain.end_tokens[0] if speech is None and plain.end_tokens else None,
        prefixes={
            str(name): str(one["prefix"])
            for name, one in tasks.items()
            if isinstance(one, Mapping) and one.get("prefix")
        },
        speech=speech,
    )
    return replace(
        plain,
        begin_token=None,
        template=None,
        source=source,
        rules=_rules(generation, begun=len(source.begin_tokens)),
        warnings=_warnings(generation),
    )


def _set(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _rules(generation: Mapping[str, Any], *, begun: int) -> AnswerRules:
    words = generation.get("bad_words_ids") or []
    never = [*text.numbers(generation.get("suppress_tokens")), *(one[0] for one in words if len(one) == 1)]
    return AnswerRules(
        suppressed=tuple(sorted({one for one in never if one >= 0})),
        suppressed_first=tuple(sorted(text.numbers(generation.get("begin_suppress_tokens")))),
        no_repeat=int(generation.get("no_repeat_ngram_size") or 0),
        repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
        # transformers counts the given beginning too.
        least=max(0, int(generation.get("min_length") or 0) - begun),
    )


def _warnings(generation: Mapping[str, Any]) -> tuple[str, ...]:
    beams = generation.get("num_beams") or 1
    if beams == 1:
        return ()
    return (f"the folder asks for a search with {beams} beams: answers are written with one, token by token",)


def _speech(
    folder: Path, plain: TextFiles, generation: Mapping[str, Any], encoder: EncoderSpec, vocabulary: int
) -> Speech:
    settings = text.optional(folder / "preprocessor_config.json")
    for key, value in _FEATURES.items():
        if settings.get(key, value) != value:
            raise ModelError(
                f"{key} = {settings[key]} is not supported, only {value}",
                where=str(folder / "preprocessor_config.json"),
            )
    ids = text.token_ids(plain.tokenizer, where=str(folder / "tokenizer.json"))
    languages = {found[1]: at for name, at in ids.items() if (found := _LANGUAGE.fullmatch(name)) is not None}
    several = generation.get("is_multilingual", vocabulary != _ONE_LANGUAGE)
    return Speech(
        rate=_FEATURES["sampling_rate"],
        frame=_FEATURES["n_fft"],
        hop=_FEATURES["hop_length"],
        mels=encoder.mels,
        languages=languages if several else {},
        transcribe=ids.get("<|transcribe|>") if several else None,
        translate=ids.get("<|translate|>") if several else None,
        no_timestamps=ids.get("<|notimestamps|>"),
        no_speech=ids.get("<|nospeech|>", ids.get("<|nocaptions|>")),
    )

"""What encoder-decoders are evaluated on: sources (texts or sounds), each with the answer it should get or without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge.evaluation.decoders import texts
from kedge.evaluation.decoders.figures import Figures, Tally
from kedge.importing.data_folders import listing
from kedge_protocol import digest
from kedge_protocol.bundle.generation import Source
from kedge_protocol.errors import DatasetError, InputError
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.spec import Array
from kedge_targets.pipeline import speech as sounds

ANSWER = 64
"""Largest number of tokens of an answer that is compared."""
_SOURCES, _TARGETS = ("source", "input", "text"), ("target", "output", "answer")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One source and its answer.

    Attributes:
        source: what the encoder reads.
        begin: the tokens that are given before the answer.
        answer: its tokens with the end token; empty if only the float model knows.
    """

    source: Array
    begin: tuple[int, ...]
    answer: tuple[int, ...]


def of_texts(path: Path, tokenizer: Any, source: Source, *, wanted: int) -> tuple[list[Pair], str]:
    """Return pairs of texts, spread evenly, and the digest of all.

    ``.jsonl`` holds an object with ``source`` and optionally ``target`` on each line, ``.tsv`` a source, a tab and its
    target; of other files each line is a source.

    Raises:
        DatasetError: there is no text, or a file cannot be read.
    """
    found = [pair for file in texts.files(path, (*texts.SUFFIXES, ".tsv")) for pair in _lines(file) if pair[0].strip()]
    if not found:
        raise DatasetError("all texts are empty", where=str(path), remedy="Give some hundred sentences")
    marked = digest.of_bytes("\0".join("\t".join(pair) for pair in found).encode("utf-8", "surrogatepass"))
    end = () if source.end_token is None else (source.end_token,)
    pairs = []
    for text, answer in _spread(found, wanted):
        read = [*tokenizer.encode(text, add_special_tokens=False).ids[: source.positions - len(end)], *end]
        written = tokenizer.encode(answer, add_special_tokens=False).ids[: ANSWER - 1] if answer else []
        pairs.append(Pair(source=_numbers(read), begin=source.begin_tokens, answer=(*written, *end) if written else ()))
    return pairs, marked


def _numbers(tokens: list[int]) -> Array:
    import numpy as np

    return np.array(tokens, np.int64)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    kind = file.suffix.lower()
    if kind == ".parquet":
        yield from ((text, "") for text in texts.of_file(file))
        return
    for number, line in texts.numbered_lines(file):
        if kind == ".tsv":
            text, _, answer = line.partition("\t")
            yield text, answer
        elif kind == ".jsonl":
            yield _of_object(line, f"{file}:{number}")
        else:
            yield line, ""


def _of_object(line: str, where: str) -> tuple[str, str]:
    remedy = 'Write {"source": …, "target": …}'
    value = texts.parsed(line, where, remedy=remedy)
    if isinstance(value, str):
        return value, ""
    if isinstance(value, dict):
        text = next((value[key] for key in _SOURCES if isinstance(value.get(key), str)), None)
        if text is not None:
            return text, next((value[key] for key in _TARGETS if isinstance(value.get(key), str)), "")
    raise DatasetError("holds no text", where=where, remedy=remedy)


def of_sounds(
    path: Path, tokenizer: Any, source: Source, end: tuple[int, ...], *, wanted: int
) -> tuple[list[Pair], str]:
    """Return pairs of wav files and their transcripts (a ``.txt`` of the same name, if there is one), and the digest of
    all. A longer sound's first window is taken.

    Args:
        end: the token after a transcript.

    Raises:
        DatasetError: there is no sound, or one cannot be read.
    """
    files = listing.endings(path, listing.SOUND_ENDINGS, deep=True) if path.is_dir() else [path]
    if not files or not files[0].is_file() or files[0].suffix.lower() not in listing.SOUND_ENDINGS:
        raise DatasetError("holds no sound", where=str(path), remedy="Give a folder of .wav files")
    marked = digest.of_bytes("\0".join(digest.of_file(file) for file in files).encode())
    if source.speech is None:
        raise DatasetError("the model hears nothing", where=str(path))
    pairs = []
    for file in _spread(files, wanted):
        try:
            samples = sounds.load(file, source.speech)
        except InputError as error:
            raise DatasetError(error.what, where=str(file), remedy=error.remedy) from error
        beside = file.with_suffix(".txt")
        answer = texts.whole(beside).strip() if beside.is_file() else ""
        written = tokenizer.encode(f" {answer}", add_special_tokens=False).ids[: ANSWER - 1] if answer else []
        first, last = sounds.windows(samples, source)[0]
        pairs.append(
            Pair(
                source=sounds.features(samples[first:last], source),
                begin=source.begin_tokens,
                answer=(*written, *end) if written else (),
            )
        )
    return pairs, marked


def _spread(found: list[Any], wanted: int) -> list[Any]:
    if len(found) <= wanted:
        return found
    return [found[round((len(found) - 1) * at / (wanted - 1))] for at in range(wanted)]


def judged(session: DecoderSession, reference: DecoderSession, pairs: list[Pair]) -> Figures:
    """Evaluate a session beside the float model's; uses the first slots."""
    tally = Tally()
    for pair in pairs:
        tally.begin()
        tokens = [*pair.begin, *pair.answer][:-1]
        logits = []
        for one in (session, reference):
            one.attend(0, pair.source)
            logits.append(one.extend(0, tokens, keep=len(pair.answer)))
        tally.add(logits[0], logits[1], _numbers(list(pair.answer)))
    return tally.figures()


def answered(reference: DecoderSession, pair: Pair, source: Source, ends: tuple[int, ...], *, most: int) -> Pair:
    """Return a pair with the float model's own answer where it has none, and the language that the model hears."""
    reference.attend(0, pair.source)
    begin = pair.begin
    if source.speech is not None:
        first = reference.extend(0, list(begin))[0]
        heard = max(source.speech.languages.values(), key=lambda token: first[token], default=None)
        begin = sounds.beginning(source, heard, translate=False)
    if pair.answer:
        return Pair(source=pair.source, begin=begin, answer=pair.answer[:most])
    reference.truncate(0, 0)
    written = [int(reference.extend(0, list(begin))[0].argmax())]
    while written[-1] not in ends and len(written) < most:
        written.append(int(reference.step({0: written[-1]})[0].argmax()))
    return Pair(source=pair.source, begin=begin, answer=tuple(written))

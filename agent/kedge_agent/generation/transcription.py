"""Writes down what is said in a sound, window by window."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_agent.generation.reading import Reading
from kedge_agent.generation.sampling import Sampling
from kedge_agent.generation.tickets import LENGTH, Order
from kedge_protocol.bundle.generation import Source, Speech
from kedge_protocol.errors import InputError
from kedge_targets.pipeline import speech as sounds

if TYPE_CHECKING:
    from kedge_agent.generation.generator import TextGenerator

Array = npt.NDArray[Any]

TASKS = ("transcribe", "translate")
_NO_SPEECH = 0.6
_LEAST = -1.0
"""As OpenAI's own program: a window is silent if its no-speech token is likelier than the first of these, and its
text's mean log-probability is below the second."""


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What is said in one window.

    Attributes:
        start, end: seconds from the beginning of the sound.
        tokens: the tokens of ``text``.
        mean_log_probability: of the tokens, natural logarithm.
        no_speech: probability that nobody speaks, as far as the model has it among its likeliest tokens.
        whole: whether the model ended the text itself, rather than by the limit of its context.
    """

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    mean_log_probability: float
    no_speech: float
    whole: bool


@dataclass(frozen=True, kw_only=True)
class Transcript:
    """What is said in a sound; ``str()`` of it is the text.

    Attributes:
        language: the spoken language (``en``), as given or heard; empty for a model of one language.
        seconds: length of the sound.
        segments: windows in which somebody speaks.
    """

    text: str
    language: str
    seconds: float
    segments: tuple[Segment, ...]

    def __str__(self) -> str:
        """Return the text."""
        return self.text


class _OneOf:
    """Lets only one of some tokens follow, and nothing after it."""

    def __init__(self, tokens: list[int]) -> None:
        self._tokens = tokens

    def allowed(self, logits: Array) -> Array:
        """Return logits in which all other tokens are negative infinity."""
        found = np.full_like(logits, -np.inf)
        found[self._tokens] = logits[self._tokens]
        return found

    def take(self, token: int) -> bool:
        """Return that the answer is complete."""
        return True


def transcribe(
    generator: TextGenerator,
    sound: Any,
    *,
    language: str | None = None,
    task: str = "transcribe",
    temperature: float = 0.0,
    seed: int | None = None,
    gone: Callable[[], bool] = lambda: False,
) -> Transcript:
    """Write down what is said in a sound.

    A sound longer than the model's window (30 s) is cut where the last third of a window is quietest, and each part is
    heard by itself.

    Args:
        sound: see :func:`kedge_targets.pipeline.audio.load`.
        language: the spoken language (``en``); None to take the likeliest of the first part.
        task: ``transcribe``, or ``translate`` into English.
        gone: whether nobody wants the answer any more.

    Raises:
        InputError: the sound cannot be read, or language or task is not known.
        BusyError: too many answers already wait.
    """
    source = generator.spec.source
    how = None if source is None else source.speech
    if source is None or how is None:
        raise generator.refusal()
    _check(how, language, task)
    samples = sounds.load(sound, how, where="sound" if isinstance(sound, (bytes, bytearray, memoryview)) else "")
    sampling = Sampling(temperature=temperature, seed=seed)
    spoken, segments = language or "", []
    for first, last in sounds.windows(samples, source):
        if gone():
            break
        reading = Reading.of(sounds.features(samples[first:last], source))
        heard, silence = _begun(generator, source, how, reading)
        spoken = spoken or heard
        begin = sounds.beginning(source, how.languages.get(spoken), translate=task == "translate")
        found = _segment(generator, begin, reading, sampling, (first / how.rate, last / how.rate), silence, gone)
        if not (silence > _NO_SPEECH and found.mean_log_probability < _LEAST):
            segments.append(found)
    text = "".join(segment.text for segment in segments).strip()
    return Transcript(text=text, language=spoken, seconds=len(samples) / how.rate, segments=tuple(segments))


def _check(how: Speech, language: str | None, task: str) -> None:
    if language is not None and how.languages and language not in how.languages:
        raise InputError(
            f"the language {language!r} is not known", where="language", remedy=f"Known are {', '.join(how.languages)}"
        )
    if task not in TASKS or (task == "translate" and how.translate is None):
        known = TASKS if how.translate is not None else TASKS[:1]
        raise InputError(f"the task {task!r} is not known", where="task", remedy=f"Known are {', '.join(known)}")


def _begun(generator: TextGenerator, source: Source, how: Speech, reading: Reading) -> tuple[str, float]:
    """Return the likeliest language, and the probability that nobody speaks."""
    if not how.languages and how.no_speech is None:
        return "", 0.0
    order = Order(
        prompt=source.begin_tokens,
        max_tokens=1,
        top_log_probabilities=1,
        reading=reading,
        matcher=_OneOf(list(how.languages.values())) if how.languages else None,
    )
    found = list(generator.engine.submit(order))
    if not found:
        return "", 0.0
    first = found[0]
    likeliest, log_probability = first.top[0]
    names = {token: name for name, token in how.languages.items()}
    return names.get(first.id, ""), math.exp(log_probability) if likeliest == how.no_speech else 0.0


def _segment(
    generator: TextGenerator,
    begin: tuple[int, ...],
    reading: Reading,
    sampling: Sampling,
    span: tuple[float, float],
    silence: float,
    gone: Callable[[], bool],
) -> Segment:
    room = generator.spec.context - len(begin)
    stream = generator.stream(begin, max_tokens=room, sampling=sampling, log_probabilities=0, reading=reading)
    for _ in stream:
        if gone():
            stream.close()
    answer = stream.finish()
    logs = [token.log_probability or 0.0 for token in answer.log_probabilities]
    return Segment(
        start=span[0],
        end=span[1],
        text=answer.text,
        tokens=answer.tokens,
        mean_log_probability=sum(logs) / max(1, len(logs)),
        no_speech=silence,
        whole=answer.reason != LENGTH,
    )

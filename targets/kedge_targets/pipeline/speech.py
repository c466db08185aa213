"""Prepares sounds for models of speech (Whisper): windows of a recording, their log-mel features, and the tokens that
say what to write. Formulas: Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.generation import Source, Speech
from kedge_protocol.bundle.pipeline import MelScale, Sound
from kedge_protocol.errors import InputError
from kedge_targets.pipeline import audio

Float = npt.NDArray[np.float32]

_FLOOR = 1e-10
_RANGE = 8.0
"""Decades below the loudest energy that are told apart."""
_CUT_FROM = 2 / 3
"""Share of a window after which a longer recording may be cut."""
_QUIET = 0.2
"""Seconds whose loudness is compared."""


def load(item: Any, how: Speech, *, where: str = "") -> Float:
    """Return a recording's samples; see :func:`kedge_targets.pipeline.audio.load`.

    Raises:
        InputError: the item is no sound, or holds no sample.
    """
    samples = audio.load(item, Sound(sample_rate=how.rate), where=where)
    if not samples.size:
        raise InputError("the sound is empty", where=where or None)
    return samples


def window_length(source: Source) -> int:
    """Return the number of samples that the encoder hears at once."""
    return 2 * source.positions * (source.speech.hop if source.speech is not None else 0)


def windows(samples: Float, source: Source) -> list[tuple[int, int]]:
    """Return where to cut a recording: first sample and the one after the last of each part.

    A recording that is longer than a window is cut where its last third of a window is quietest, again and again, so
    that no word is cut in two as long as the speaker pauses.
    """
    size = window_length(source)
    rate = source.speech.rate if source.speech is not None else 1
    found, first = [], 0
    while len(samples) - first > size:
        start = first + int(size * _CUT_FROM)
        cut = start + _quietest(samples[start : first + size], max(1, int(_QUIET * rate)))
        found.append((first, cut))
        first = cut
    return [*found, (first, len(samples))]


def _quietest(samples: Float, span: int) -> int:
    """Return the middle of the span with the least energy."""
    sums = np.concatenate([[0.0], np.cumsum(samples.astype(np.float64) ** 2)])
    if len(samples) <= span:
        return len(samples)
    return int(np.argmin(sums[span:] - sums[:-span])) + span // 2


def features(samples: Float, source: Source) -> Float:
    """Return the encoder's input, float32 [mels, frames]: the log of mel energies within 80 dB of the loudest, of a
    window that is filled with silence."""
    how = source.speech
    if how is None:
        raise InputError("the model hears nothing")
    filled = audio.fitted(samples, window_length(source)).astype(np.float64)
    half = how.frame // 2
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(filled, half, mode="reflect"), how.frame)[:: how.hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(how.frame) / how.frame)
    power = np.abs(np.fft.rfft(frames[: 2 * source.positions] * window, axis=1)) ** 2
    bank = audio.filters(how.frame, how.rate, how.mels, 0.0, how.rate / 2, MelScale.SLANEY)
    logs = np.log10(np.maximum(power @ bank, _FLOOR))
    bounded = (np.maximum(logs, logs.max() - _RANGE) + 4) / 4
    return np.ascontiguousarray(bounded.T, dtype=np.float32)


def beginning(source: Source, language: int | None, *, translate: bool) -> tuple[int, ...]:
    """Return the tokens before an answer.

    Args:
        language: the language's token; None for a model of one language.
        translate: whether to write English whatever is spoken.
    """
    how = source.speech
    if how is None:
        return source.begin_tokens
    task = how.translate if translate else how.transcribe
    return (*source.begin_tokens, *(one for one in (language, task, how.no_timestamps) if one is not None))

"""Resamples sounds and computes log-mel energies and MFCC with only numpy and the standard library.

Formulas: resampling by windowed-sinc interpolation (J. O. Smith, Digital Audio Resampling; width 6, roll-off 0.99, Hann
window, as torchaudio has it); the mel scale of HTK (O'Shaughnessy, 1987) or of Slaney's Auditory Toolbox (1998);
MFCC as the orthonormal DCT-II of the log-mel energies (Davis and Mermelstein, 1980).
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Features, MelScale, Sound
from kedge_protocol.errors import InputError
from kedge_targets.pipeline import wav

Array = npt.NDArray[Any]
Float = npt.NDArray[np.float32]

MAX_SECONDS = 3600.0
"""A longer sound is rejected."""
_WIDTH = 6
_ROLL_OFF = 0.99


def load(item: Any, how: Sound, *, where: str = "") -> Float:
    """Return one channel of samples in -1..1 at the pipeline's rate; several channels are averaged.

    Args:
        item: the path or the bytes of a wav file; samples at the pipeline's rate (float in -1..1, or int16), frames x
            channels if there are several; or ``(samples, rate)``.

    Raises:
        InputError: the item is not such a sound.
    """
    if isinstance(item, (str, os.PathLike)):
        path = Path(item)
        try:
            return decode(path.read_bytes(), how, where=where or str(path))
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    if isinstance(item, (bytes, bytearray, memoryview)):
        return decode(bytes(item), how, where=where)
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int):
        return resampled(_samples(np.asarray(item[0]), where), item[1], how.sample_rate)
    return _samples(np.asarray(item), where)


def decode(content: bytes, how: Sound, *, where: str = "") -> Float:
    """Decode a wav file's bytes to samples: integers of 8 to 32 bits, or floats; see :func:`load`."""
    try:
        frames, rate = wav.read(content)
    except wav.WavError as error:
        raise InputError(
            f"is no wav file that can be read: {error}",
            where=where or None,
            remedy="Give a wav file of PCM with 8 to 32 bits, or of floats",
        ) from error
    if len(frames) / rate > MAX_SECONDS:
        raise InputError(
            f"a sound of {len(frames)} samples at {rate} Hz is over the limit of {MAX_SECONDS:.0f} s",
            where=where or None,
        )
    return resampled(frames.mean(axis=1, dtype=np.float64).astype(np.float32), rate, how.sample_rate)


def _samples(array: Array, where: str) -> Float:
    if array.ndim == 2:
        array = array.mean(axis=1) if array.dtype.kind == "f" else array.astype(np.float64).mean(axis=1) / 32768
    elif array.dtype == np.int16:
        array = array.astype(np.float32) / 32768
    if array.ndim != 1 or array.dtype.kind != "f" or not array.size or not np.isfinite(array).all():
        raise InputError(
            f"an array {array.dtype} {'x'.join(map(str, array.shape))} is no sound",
            where=where or None,
            remedy="Give samples in -1..1 as float32, or as int16; for the model's own tensors call Model.raw",
        )
    return array.astype(np.float32)


def resampled(samples: Float, rate: int, wanted: int) -> Float:
    """Resample a sound to another rate; the result has ``ceil(length * wanted / rate)`` samples."""
    if rate == wanted or not samples.size:
        return samples
    shared = math.gcd(rate, wanted)
    given, made = rate // shared, wanted // shared
    kernels, width = _kernels(given, made)
    padded = np.pad(samples.astype(np.float64), (width, width + given))
    frames = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[1])[::given]
    length = -(-made * len(samples) // given)
    return np.asarray((frames @ kernels.T).reshape(-1)[:length], np.float32)


@functools.lru_cache(maxsize=8)
def _kernels(given: int, made: int) -> tuple[Array, int]:
    """Return one filter for each of ``made`` output phases, and its reach in input samples."""
    lowest = min(given, made) * _ROLL_OFF
    width = math.ceil(_WIDTH * given / lowest)
    at = np.arange(-width, width + given)[None, :] / given
    phase = (at - np.arange(made)[:, None] / made) * lowest
    phase = np.clip(phase, -_WIDTH, _WIDTH)
    return np.sinc(phase) * np.cos(phase * np.pi / _WIDTH / 2) ** 2 * (lowest / given), width


def fitted(samples: Float, count: int) -> Float:
    """Return the first ``count`` samples, padding a shorter sound with silence; all if ``count`` is 0."""
    if not count:
        return samples
    return np.pad(samples[:count], (0, max(0, count - len(samples))))


def features(samples: Float, how: Sound) -> Float:
    """Return the model's features of the samples: the samples themselves, or frames x features.

    Raises:
        InputError: the sound is shorter than one frame.
    """
    scaled = samples * np.float32(how.gain) if how.gain != 1.0 else samples
    if how.features is Features.WAVEFORM:
        return scaled
    mels = log_mel(scaled, how)
    return mels if how.features is Features.LOG_MEL else mfcc(mels, how.coefficients)


def log_mel(samples: Float, how: Sound) -> Float:
    """Return the natural logarithm of the mel filters' energies, frames x filters. Frames of ``how.frame`` samples
    under a (periodic) Hann window are padded with zeros to ``how.fft``; the ends are not padded."""
    if len(samples) < how.frame:
        raise InputError(f"a sound of {len(samples)} samples is shorter than one frame of {how.frame}")
    size = fft_size(how)
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float64), how.frame)[:: how.hop]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(how.frame) / how.frame)
    power = np.abs(np.fft.rfft(frames * window, n=size, axis=1)) ** 2
    bank = filters(size, how.sample_rate, how.mels, how.low, how.high or how.sample_rate / 2, how.mel_scale)
    return np.asarray(np.log(np.maximum(power @ bank, how.floor)), np.float32)


def fft_size(how: Sound) -> int:
    """Return the length of the Fourier transform."""
    return how.fft or 1 << (how.frame - 1).bit_length()


def mfcc(mels: Float, count: int) -> Float:
    """Return the first ``count`` coefficients of the orthonormal DCT-II of log-mel energies (frames x filters)."""
    size = mels.shape[1]
    places = (np.arange(size) + 0.5)[:, None] * np.arange(count)[None, :]
    basis = np.cos(np.pi / size * places) * math.sqrt(2 / size)
    basis[:, 0] = math.sqrt(1 / size)
    return np.asarray(mels.astype(np.float64) @ basis, np.float32)


@functools.lru_cache(maxsize=8)
def filters(size: int, rate: int, count: int, low: float, high: float, scale: MelScale) -> Array:
    """Return triangular filters, evenly spaced on the mel scale: ``size / 2 + 1`` frequencies x ``count``."""
    edges = _to_hertz(np.linspace(_to_mel(low, scale), _to_mel(high, scale), count + 2), scale)
    hertz = np.linspace(0, rate / 2, size // 2 + 1)[:, None]
    left, middle, right = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz - left) / (middle - left), (right - hertz) / (right - middle)
    bank = np.maximum(0.0, np.minimum(rising, falling))
    return np.asarray(bank * (2.0 / (right - left)) if scale is MelScale.SLANEY else bank)


_SLANEY_STEP = 200.0 / 3
_SLANEY_BREAK = 1000.0
_SLANEY_LOG = math.log(6.4) / 27


def _to_mel(hertz: float, scale: MelScale) -> float:
    if scale is MelScale.HTK:
        return 2595.0 * math.log10(1.0 + hertz / 700.0)
    if hertz < _SLANEY_BREAK:
        return hertz / _SLANEY_STEP
    return _SLANEY_BREAK / _SLANEY_STEP + math.log(hertz / _SLANEY_BREAK) / _SLANEY_LOG


def _to_hertz(mel: Array, scale: MelScale) -> Array:
    if scale is MelScale.HTK:
        return np.asarray(700.0 * (10.0 ** (mel / 2595.0) - 1.0))
    bend = _SLANEY_BREAK / _SLANEY_STEP
    above = _SLANEY_BREAK * np.exp(_SLANEY_LOG * (np.maximum(mel, bend) - bend))
    return np.where(mel < bend, mel * _SLANEY_STEP, above)

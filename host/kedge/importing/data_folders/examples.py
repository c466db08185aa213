"""Raw items kept small as a bundle's examples: the bytes of a JPEG, a wav file or a text."""

from __future__ import annotations

import io
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.bundle.pipeline import Pipeline, Sound
from kedge_targets.pipeline import audio, pictures, resampling

_SIDE = 256
"""The maximum length of a kept picture's longer side, in pixels."""
_QUALITY = 90
_SECONDS = 4
"""The maximum length of a kept sound, in seconds."""


def write_examples(sources: Sequence[Path | str], pipeline: Pipeline, folder: Path) -> str:
    """Write the files ``0``, ``1``, … into a new folder and return its path."""
    folder.mkdir()
    for number, source in enumerate(sources):
        (folder / str(number)).write_bytes(small(source, pipeline))
    return str(folder)


def small(source: Path | str, pipeline: Pipeline) -> bytes:
    """Return a raw item's bytes, small enough to ship in a bundle."""
    if pipeline.picture is not None:
        return _picture(pictures.load(source))
    if pipeline.sound is not None:
        return _sound(source, pipeline.sound)
    return str(source).encode()


def _picture(pixels: Any) -> bytes:
    from PIL import Image

    height, width = pixels.shape[:2]
    share = min(1.0, _SIDE / max(width, height))
    made = resampling.resize(pixels, (max(1, round(width * share)), max(1, round(height * share))))
    buffer = io.BytesIO()
    Image.fromarray(made[..., 0] if made.shape[2] == 1 else made).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _sound(source: Path | str, how: Sound) -> bytes:
    samples = audio.load(source, how)[: (how.samples or how.sample_rate * _SECONDS)][: how.sample_rate * _SECONDS]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(how.sample_rate)
        file.writeframes(np.clip(np.rint(samples * 32768), -32768, 32767).astype("<i2").tobytes())
    return buffer.getvalue()

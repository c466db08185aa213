"""Silero's voice detector, with its state and sample rate, from a minute of sound to a session on the device."""

from __future__ import annotations

import subprocess
import wave
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tests.support import foreign, requirements

import kedge
from kedge_agent import Model
from kedge_protocol.errors import BudgetError

pytestmark = pytest.mark.zoo

RATE, FRAME, CONTEXT = 16000, 512, 64
FRAMES = 60 * RATE // FRAME


def sound(frames: int, seed: int) -> np.ndarray:
    """``[frames, 576]``: noise and voiced sounds in turns, each frame with the end of the one before, as the detector
    takes them. No speech is at hand that may be given away; pulses through two formants are like it."""
    rng = np.random.default_rng(seed)
    parts, length = [], 0
    while length < frames * FRAME:
        size = int(rng.integers(4000, 12000))
        part = rng.normal(0, 0.003, size)
        if rng.random() < 0.5:
            time = np.arange(size) / RATE
            pitch, first, second = rng.uniform(90, 220), rng.uniform(400, 800), rng.uniform(1200, 2200)
            for harmonic in range(1, 25):
                tone = pitch * harmonic * (1 + 0.02 * np.sin(8 * np.pi * time))
                near = np.exp(-(((harmonic * pitch - first) / 300) ** 2))
                near += 0.5 * np.exp(-(((harmonic * pitch - second) / 400) ** 2))
                part += 0.15 * near * np.sin(2 * np.pi * np.cumsum(tone) / RATE)
        parts.append(part)
        length += size
    whole = np.concatenate(parts)[: frames * FRAME].astype(np.float32).reshape(frames, FRAME)
    before = np.concatenate([np.zeros((1, CONTEXT), np.float32), whole[:-1, -CONTEXT:]])
    return np.concatenate([before, whole], axis=1)


def compiled(
    folder: Path, path: Path, calibration: np.ndarray, evaluation: np.ndarray, **options: Any
) -> kedge.Release:
    """A Silero model's bundle for generic-cpu; frames ``[N, 576]``."""
    np.savez(folder / "c.npz", input=calibration, sr=np.int64(RATE))
    np.savez(folder / "e.npz", input=evaluation, sr=np.int64(RATE))
    return kedge.compile(
        path,
        name="voice",
        version="1",
        targets=["generic-cpu"],
        calibration=folder / "c.npz",
        evaluation=folder / "e.npz",
        out=folder / "OUT",
        **options,
    )


def both(release: kedge.Release, path: Path, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores of frames one after another, by the float model and by the bundle's session."""
    step = Model(release.path, target="generic-cpu").session()
    whole = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state, wanted, got = np.zeros((2, 1, 128), np.float32), [], []
    for frame in frames:
        answer, state = whole.run(None, {"input": frame[None], "state": state, "sr": np.array(RATE)})
        wanted.append(float(answer[0, 0]))
        got.append(float(np.ravel(step(frame, sr=RATE))[0]))
    return np.array(wanted), np.array(got)


@pytest.mark.parametrize("name", ["silero_vad.onnx", "silero_vad_16k_op15.onnx"])
def test_a_session_decides_as_float_does_frame_by_frame(tmp_path: Path, name: str) -> None:
    path = foreign.package("silero-vad") / "silero_vad" / "data" / name
    release = compiled(tmp_path, path, sound(300, 1), sound(300, 2), effort="quick", max_drop=0.02)
    config = release.bundles["generic-cpu"].config
    assert [(state.input, state.output) for state in config.states] == [("state", "stateN")]
    float_scores, scores = both(release, path, sound(FRAMES, 3))
    # The sound is no speech: beside 0.5, the float model's own highest tenth divides it too.
    for edge in (0.5, float(np.quantile(float_scores, 0.9))):
        near = np.abs(float_scores - edge) < 0.01
        assert np.array_equal((float_scores > edge)[~near], (scores > edge)[~near])
    assert np.abs(float_scores - scores).max() < 0.02


SENTENCES = (
    "The door of the workshop is open, please close it before the rain comes.",
    "Seven boats left the harbour this morning.",
    "Turn the light off.",
    "We measured the temperature twice, and both times it was below zero.",
    "Yes.",
    "Nobody knows how long the battery will last in such cold weather.",
)
VOICES = ("en-us", "en-gb", "de", "fr", "en-us+f3", "en-gb-scotland")


def speech(folder: Path, seed: int, seconds: int) -> np.ndarray:
    """``[frames, 576]``: sentences of espeak-ng by several voices, with pauses of 0.2 to 2 s and a faint noise."""
    espeak = requirements.program("espeak-ng")
    rng = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    for at in range(1000):
        file = folder / f"{seed}-{at}.wav"
        voice, pace = VOICES[int(rng.integers(len(VOICES)))], str(int(rng.integers(120, 190)))
        text = SENTENCES[int(rng.integers(len(SENTENCES)))]
        subprocess.run([espeak, "-v", voice, "-s", pace, "-w", str(file), text], check=True, timeout=300)
        with wave.open(str(file)) as opened:
            rate, raw = opened.getframerate(), opened.readframes(opened.getnframes())
        sound = np.frombuffer(raw, "<i2").astype(np.float64) / 32768
        there = np.arange(0, len(sound), rate / RATE)
        parts += [np.interp(there, np.arange(len(sound)), sound), np.zeros(int(rng.uniform(0.2, 2.0) * RATE))]
        if sum(map(len, parts)) >= seconds * RATE:
            break
    frames = seconds * RATE // FRAME
    whole = np.concatenate(parts)[: frames * FRAME]
    whole = (whole + rng.normal(scale=0.002, size=len(whole))).astype(np.float32).reshape(frames, FRAME)
    before = np.concatenate([np.zeros((1, CONTEXT), np.float32), whole[:-1, -CONTEXT:]])
    return np.concatenate([before, whole], axis=1)


def segments(scores: np.ndarray) -> list[tuple[int, int]]:
    """From which frame to which there is speech, by the rule of ``silero_vad.get_speech_timestamps``: begun at 0.5,
    ended by 100 ms below 0.35, at least 250 ms long."""
    found, begun, below = [], -1, -1
    for at, score in enumerate([*scores, 0.0, 0.0, 0.0, 0.0]):
        if score >= 0.5:
            begun, below = (at if begun < 0 else begun), -1
        elif begun >= 0 and score < 0.35:
            below = at if below < 0 else below
            if (at - below) * FRAME >= 0.1 * RATE:
                if (below - begun) * FRAME > 0.25 * RATE:
                    found.append((begun, below))
                begun = below = -1
    return found


def test_speech_is_found_where_float_finds_it(tmp_path: Path) -> None:
    path = foreign.package("silero-vad") / "silero_vad" / "data" / "silero_vad_16k_op15.onnx"
    release = compiled(tmp_path, path, speech(tmp_path, 1, 20), speech(tmp_path, 2, 20), effort="quick", max_drop=0.05)
    float_scores, scores = both(release, path, speech(tmp_path, 3, 60))
    assert len(segments(float_scores)) >= 8
    mine, theirs = segments(scores), segments(float_scores)
    assert len(mine) == len(theirs)
    # A frame is 32 ms: an end may fall on either side of its threshold.
    assert (
        max(abs(a - b) for one, other in zip(mine, theirs, strict=True) for a, b in zip(one, other, strict=True)) <= 1
    )


def test_integers_throughout_are_refused_by_the_state_that_they_lose(tmp_path: Path) -> None:
    path = foreign.package("silero-vad") / "silero_vad" / "data" / "silero_vad_16k_op15.onnx"
    sounds = speech(tmp_path, 1, 20), speech(tmp_path, 2, 20)
    with pytest.raises(BudgetError, match="output 'stateN' is lost"):
        compiled(tmp_path, path, *sounds, max_drop=0.05, quantize="precision=int8")

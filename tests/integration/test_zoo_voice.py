"""Silero's voice detector, with its state and sample rate, from a minute of sound to a session on the device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from tests.support import foreign

import kedge
from kedge_agent import Model

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


@pytest.mark.parametrize("name", ["silero_vad.onnx", "silero_vad_16k_op15.onnx"])
def test_a_session_decides_as_float_does_frame_by_frame(tmp_path: Path, name: str) -> None:
    path = foreign.package("silero-vad") / "silero_vad" / "data" / name
    np.savez(tmp_path / "c.npz", input=sound(300, 1), sr=np.int64(RATE))
    np.savez(tmp_path / "e.npz", input=sound(300, 2), sr=np.int64(RATE))
    release = kedge.compile(
        path,
        name="voice",
        version="1",
        targets=["generic-cpu"],
        calibration=tmp_path / "c.npz",
        evaluation=tmp_path / "e.npz",
        out=tmp_path / "OUT",
        effort="quick",
        max_drop=0.02,
    )
    config = release.bundles["generic-cpu"].config
    assert [(state.input, state.output) for state in config.states] == [("state", "stateN")]
    step = Model(release.path, target="generic-cpu").session()
    whole = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state, wanted, got = np.zeros((2, 1, 128), np.float32), [], []
    for frame in sound(FRAMES, 3):
        answer, state = whole.run(None, {"input": frame[None], "state": state, "sr": np.array(RATE)})
        wanted.append(float(answer[0, 0]))
        got.append(float(step(frame, sr=RATE)[0]))
    float_scores, scores = np.array(wanted), np.array(got)
    # The sound is no speech: beside 0.5, the float model's own highest tenth divides it too.
    for edge in (0.5, float(np.quantile(float_scores, 0.9))):
        near = np.abs(float_scores - edge) < 0.01
        assert np.array_equal((float_scores > edge)[~near], (scores > edge)[~near])
    assert np.abs(float_scores - scores).max() < 0.02

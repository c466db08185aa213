"""A transducer of three models: encoder and predictor carry their states on the device, and the words are the float
models'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from tests.support import transducer

import kedge
from kedge_agent import Model

TARGET = "generic-cpu"
SPEAKERS = 8


def chunks(seeds: range) -> np.ndarray:
    """``[utterances, chunks, 4, 12]`` of one length."""
    found = [transducer.utterance(10, seed)[0] for seed in seeds]
    count = min(len(one) for one in found) // transducer.CHUNK
    return np.stack([one[: count * transducer.CHUNK].reshape(count, transducer.CHUNK, -1) for one in found])


def spoken(seeds: range) -> np.ndarray:
    """``[utterances, tokens, 1]``."""
    return np.array([[0, *transducer.utterance(10, seed)[1]] for seed in seeds], np.int64)[..., None]


def compiled(model: Path, folder: Path, calibration: Any, evaluation: Any, **options: Any) -> kedge.Release:
    for name, arrays in (("c", calibration), ("e", evaluation)):
        np.savez(folder / f"{name}.npz", **arrays)
    return kedge.compile(
        model, name=model.stem, version="1", targets=[TARGET], calibration=folder / "c.npz",
        evaluation=folder / "e.npz", out=folder / model.stem, effort="quick", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def float_models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    return transducer.models(tmp_path_factory.mktemp("transducer"))


@pytest.fixture(scope="module")
def releases(
    float_models: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[kedge.Release, kedge.Release, kedge.Release]:
    folder = tmp_path_factory.mktemp("releases")
    encoder, decoder, joiner = float_models
    data = [
        (chunks(range(100, 100 + SPEAKERS)), chunks(range(200, 200 + SPEAKERS))),
        (spoken(range(100, 100 + SPEAKERS)), spoken(range(200, 200 + SPEAKERS))),
    ]
    first = compiled(encoder, folder, *({"x": one} for one in data[0]), max_drop=0.02)
    second = compiled(decoder, folder, *({"y": one} for one in data[1]), max_drop=0.02)
    seen = [transducer.pairs(encoder, decoder, range(at, at + SPEAKERS)) for at in (100, 200)]
    feeds = [{"encoder_out": heard, "decoder_out": guessed, "label": tokens} for heard, guessed, tokens in seen]
    del feeds[0]["label"]
    return first, second, compiled(joiner, folder, *feeds, max_drop=0.02, quantize="precision=int8")


def test_states_are_paired_by_the_names_of_the_field(releases: tuple[kedge.Release, ...]) -> None:
    encoder, decoder, joiner = (one.bundles[TARGET].config for one in releases)
    assert {one.input: one.output for one in encoder.states} == transducer.ENCODER_STATES
    assert {one.input: one.output for one in decoder.states} == transducer.DECODER_STATES
    assert joiner.states == ()
    assert joiner.precision == "int8"


def test_the_words_are_those_of_the_float_models(
    float_models: tuple[Path, Path, Path], releases: tuple[kedge.Release, ...]
) -> None:
    encoder, decoder, joiner = (Model(one.path, target=TARGET) for one in releases)
    session = onnxruntime.InferenceSession(str(float_models[2]), providers=["CPUExecutionProvider"])
    right = same = total = 0
    for seed in range(300, 312):
        frames, said, _ = transducer.utterance(10, seed)
        wanted = transducer.greedy(
            frames,
            transducer.carrying(float_models[0], transducer.ENCODER_STATES),
            transducer.carrying(float_models[1], transducer.DECODER_STATES),
            lambda heard, guessed: np.asarray(session.run(None, {"encoder_out": heard, "decoder_out": guessed})[0]),
        )
        stream, history = encoder.session(), decoder.session()
        got = transducer.greedy(
            frames,
            lambda chunk, stream=stream: stream(x=chunk),  # type: ignore[misc]
            lambda token, history=history: history(y=token),  # type: ignore[misc]
            lambda heard, guessed: joiner(encoder_out=heard, decoder_out=guessed),
        )
        right += wanted == said
        same += got == wanted
        total += 1
    assert right >= total / 3, "the float models understand nothing"
    assert same >= total - 1

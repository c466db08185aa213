"""A small transducer (RNN-T) as sherpa-onnx and NeMo export one: a streaming encoder with its states, a predictor of
tokens with its own, and a joiner; fitted to a made-up language without training a network.

The two LSTMs keep random weights; of the joiner least squares fits the last layer to known alignments. A word is three
frames of its own; no word follows itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]

FEATURES, CHUNK, UNITS, WORDS = 12, 4, 48, 6
"""Of a frame; frames of a call of the encoder; of each LSTM; tokens, 0 being the blank."""
_LENGTH = 3
_INNER = 160
_RIDGE = 1e-4

Step = Callable[..., Array]


def utterance(words: int, seed: int) -> tuple[Array, list[int], list[int]]:
    """Frames [T, 12] with T a multiple of the chunk; the words; the frame in which each ends."""
    patterns = np.random.default_rng(77).normal(size=(WORDS, _LENGTH, FEATURES))
    rng = np.random.default_rng(seed)
    frames: list[np.ndarray] = []
    said: list[int] = []
    ends: list[int] = []
    for _ in range(words):
        word = int(rng.choice([one for one in range(1, WORDS) if one not in said[-1:]]))
        frames += [*patterns[word], *np.zeros((int(rng.integers(1, 4)), FEATURES))]
        said.append(word)
        ends.append(_last(frames))
    frames += [np.zeros(FEATURES)] * (-len(frames) % CHUNK)
    noisy = np.array(frames) + rng.normal(scale=0.15, size=(len(frames), FEATURES))
    return noisy.astype(np.float32), said, ends


def _last(frames: list[np.ndarray]) -> int:
    """The last frame that is no silence."""
    return max(at for at, one in enumerate(frames) if one.any())


def models(folder: Path) -> tuple[Path, Path, Path]:
    """Write ``encoder.onnx``, ``decoder.onnx`` and ``joiner.onnx``."""
    encoder, decoder = _encoder(folder / "encoder.onnx"), _decoder(folder / "decoder.onnx")
    joiner = _joiner(folder / "joiner.onnx", _fitted(encoder, decoder))
    return encoder, decoder, joiner


def greedy(frames: Array, encode: Step, predict: Step, join: Step) -> list[int]:
    """Words of an utterance, by the likeliest token: chunk after chunk, a word in a frame at most twice.

    Args:
        encode: a chunk [1, 4, 12] to [1, 4, D], carrying its states.
        predict: a token [1, 1] to [1, D], carrying its states.
        join: of a frame and a prediction, [1, D] each, to [1, tokens].
    """
    words: list[int] = []
    predicted = predict(np.zeros((1, 1), np.int64))
    for start in range(0, len(frames), CHUNK):
        for encoded in encode(frames[None, start : start + CHUNK])[0]:
            for _ in range(2):
                token = int(np.argmax(join(encoded[None], predicted)))
                if not token:
                    break
                words.append(token)
                predicted = predict(np.array([[token]], np.int64))
    return words


def carrying(path: Path, states: dict[str, str]) -> Step:
    """A float model with its states carried: its first input to its first output."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    state = {name: np.zeros((1, 1, UNITS), np.float32) for name in states}
    first = session.get_inputs()[0].name
    names = [session.get_outputs()[0].name, *states.values()]

    def step(given: Array) -> Array:
        found = session.run(names, {first: given, **state})
        state.update(zip(states, found[1:], strict=True))
        return np.asarray(found[0])

    return step


ENCODER_STATES = {"state0": "next_state0", "state1": "next_state1"}
DECODER_STATES = {"input_states_1": "output_states_1", "input_states_2": "output_states_2"}


def _lstm(seed: int, width: int, spread: float) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    bias = np.zeros((1, 8 * UNITS))
    bias[0, 2 * UNITS : 3 * UNITS] = -0.5  # forgets soon: the gates are i, o, f, c
    return {
        "W": rng.normal(size=(1, 4 * UNITS, width)) * spread,
        "R": rng.normal(size=(1, 4 * UNITS, UNITS)) * 0.1,
        "B": bias,
    }


def _saved(path: Path, nodes: list[onnx.NodeProto], ends: tuple[list, list], stored: dict[str, np.ndarray]) -> Path:  # type: ignore[type-arg]
    held = [
        numpy_helper.from_array(array if array.dtype.kind == "i" else array.astype(np.float32), name)
        for name, array in stored.items()
    ]
    graph = helper.make_graph(nodes, path.stem, *ends, held)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def _info(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _encoder(path: Path) -> Path:
    make = helper.make_node
    nodes = [
        make("Transpose", ["x"], ["steps"], "to_time", perm=[1, 0, 2]),
        make(
            "LSTM", ["steps", "W", "R", "B", "", "state0", "state1"], ["hidden", "next_state0", "next_state1"], "lstm",
            hidden_size=UNITS,
        ),
        make("Squeeze", ["hidden", "direction"], ["timed"], "squeeze"),
        make("Transpose", ["timed"], ["encoder_out"], "to_batch", perm=[1, 0, 2]),
    ]  # fmt: skip
    ends = (
        [_info("x", "N", CHUNK, FEATURES), *(_info(name, 1, "N", UNITS) for name in ENCODER_STATES)],
        [_info("encoder_out", "N", CHUNK, UNITS), *(_info(name, 1, "N", UNITS) for name in ENCODER_STATES.values())],
    )
    return _saved(path, nodes, ends, {**_lstm(1, FEATURES, 0.8), "direction": np.array([1])})


def _decoder(path: Path) -> Path:
    make = helper.make_node
    nodes = [
        make("Gather", ["embedding", "y"], ["embedded"], "embed"),
        make("Transpose", ["embedded"], ["steps"], "to_time", perm=[1, 0, 2]),
        make(
            "LSTM", ["steps", "W", "R", "B", "", *DECODER_STATES], ["hidden", *DECODER_STATES.values()], "lstm",
            hidden_size=UNITS,
        ),
        make("Squeeze", ["hidden", "ends"], ["decoder_out"], "squeeze"),
    ]  # fmt: skip
    ends = (
        [_info("y", "N", 1, kind=TensorProto.INT64), *(_info(name, 1, "N", UNITS) for name in DECODER_STATES)],
        [_info("decoder_out", "N", UNITS), *(_info(name, 1, "N", UNITS) for name in DECODER_STATES.values())],
    )
    embedding = np.random.default_rng(5).normal(size=(WORDS, 16))
    return _saved(path, nodes, ends, {**_lstm(2, 16, 1.0), "embedding": embedding, "ends": np.array([0, 1])})


def _joiner(path: Path, outer: np.ndarray) -> Path:
    make = helper.make_node
    nodes = [
        make("MatMul", ["encoder_out", "heard"], ["a"], "heard_layer"),
        make("MatMul", ["decoder_out", "predicted"], ["b"], "predicted_layer"),
        make("Add", ["a", "b"], ["both"], "both"),
        make("Tanh", ["both"], ["inner"], "inner"),
        make("MatMul", ["inner", "outer"], ["scores"], "outer_layer"),
        make("Add", ["scores", "bias"], ["logit"], "logit"),
    ]
    ends = ([_info("encoder_out", "N", UNITS), _info("decoder_out", "N", UNITS)], [_info("logit", "N", WORDS)])
    stored = {**dict(zip(("heard", "predicted"), _projections(), strict=True)), "outer": outer[:-1], "bias": outer[-1]}
    return _saved(path, nodes, ends, stored)


def _projections() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(9)
    return rng.normal(size=(UNITS, _INNER)) * 0.4, rng.normal(size=(UNITS, _INNER)) * 0.4


def pairs(encoder: Path, decoder: Path, seeds: range) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the joiner sees along known alignments, [N, D] each, and the token that is right, [N]."""
    rows: list[tuple[np.ndarray, np.ndarray, int]] = []
    for seed in seeds:
        frames, said, ends = utterance(12, seed)
        encode, predict = carrying(encoder, ENCODER_STATES), carrying(decoder, DECODER_STATES)
        encoded = np.concatenate([encode(frames[None, at : at + CHUNK])[0] for at in range(0, len(frames), CHUNK)])
        predicted = predict(np.zeros((1, 1), np.int64))[0]
        words = dict(zip(ends, said, strict=True))
        for at, frame in enumerate(encoded):
            if at in words:
                rows.append((frame, predicted, words[at]))
                predicted = predict(np.array([[words[at]]], np.int64))[0]
            rows.append((frame, predicted, 0))
    heard, guessed, tokens = (np.array(column) for column in zip(*rows, strict=True))
    return heard.astype(np.float32), guessed.astype(np.float32), tokens


def _fitted(encoder: Path, decoder: Path) -> np.ndarray:
    """The joiner's last layer and, below, its bias."""
    heard, guessed, tokens = pairs(encoder, decoder, range(1000, 1060))
    one, other = _projections()
    given = np.concatenate([np.tanh(heard @ one + guessed @ other), np.ones((len(heard), 1))], axis=1)
    wanted = np.eye(WORDS)[tokens]
    solved: np.ndarray = 8 * np.linalg.solve(
        given.T @ given + _RIDGE * len(given) * np.eye(given.shape[1]), given.T @ wanted
    )
    return solved

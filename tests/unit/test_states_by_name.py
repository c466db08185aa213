"""States are found by the names that exporters give them."""

from __future__ import annotations

import pytest

from kedge_targets.graph import states
from kedge_targets.graph.signature import TensorInfo


def info(name: str, *shape: int | None) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype="float32")


@pytest.mark.parametrize(
    ("taken", "given"),
    [
        (["state"], ["stateN"]),  # Silero
        (["h", "c"], ["hn", "cn"]),
        (["h0", "c0"], ["hn", "cn"]),
        (["h0"], ["h1"]),
        (["h_0", "c_0"], ["h_n", "c_n"]),
        (["state0", "state1"], ["next_state0", "next_state1"]),  # sherpa-onnx, LSTM
        (["cached_key_0", "cached_key_1"], ["new_cached_key_0", "new_cached_key_1"]),  # sherpa-onnx, zipformer
        (["input_states_1", "input_states_2"], ["output_states_1", "output_states_2"]),  # NeMo, RNN-T
        (["cache_last_channel", "cache_last_time"], ["cache_last_channel_next", "cache_last_time_next"]),  # NeMo
        (["att_cache", "cnn_cache"], ["r_att_cache", "r_cnn_cache"]),  # WeNet
        (["in_cache"], ["out_cache"]),
        (["past_x"], ["present_x"]),
        (["prev_h"], ["h_next"]),
    ],
    ids=lambda names: "+".join(names),
)
def test_the_fields_own_names(taken: list[str], given: list[str]) -> None:
    inputs = [info("x", None, 4), *(info(name, 1, None, 8) for name in taken)]
    outputs = [info("y", None, 4), *(info(name, 1, None, 8) for name in given)]
    assert states.find(inputs, outputs, declared={}) == dict(zip(taken, given, strict=True))


def test_names_that_tell_no_side_are_no_states() -> None:
    inputs = [info("x", None, 4), info("a", None, 8), info("b1", None, 8), info("c0", None, 8)]
    outputs = [info("y", None, 4), info("a2", None, 8), info("b", None, 8), info("c1", None, 9)]
    assert states.find(inputs, outputs, declared={}) == {}

"""Batches that are not the first axis: found, moved to the front for the compiler, and given back to the caller."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from kedge.evaluation.dataset import Dataset
from kedge.evaluation.samples import NpyWriter
from kedge_protocol.bundle.config import NO_BATCH, FileTensor, TensorSpec
from kedge_protocol.errors import ConfigError, DatasetError
from kedge_targets.graph import batch_axes, model_reader, signature, states
from kedge_targets.graph.signature import TensorInfo

Array = np.ndarray


def value(name: str, shape: list[int | str | None], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def built(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, Array] | None = None,
) -> onnx.ModelProto:
    stored = [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model_reader.infer_shapes(model, where="test")


def stepper(batch: str | int = "N") -> onnx.ModelProto:
    """A state [2, N, 3] that is added up with x [N, 3] and scaled by a rate without a batch; scores [1, N, 3]."""
    return built(
        [
            helper.make_node("Unsqueeze", ["x", "axes"], ["row"]),
            helper.make_node("Add", ["state", "row"], ["state_out"]),
            helper.make_node("ReduceSum", ["state_out", "axes"], ["sum"], keepdims=1),
            helper.make_node("Mul", ["sum", "rate"], ["scores"]),
            helper.make_node("Identity", ["rate"], ["used"]),
        ],
        [value("x", [batch, 3]), value("state", [2, batch, 3]), value("rate", [])],
        [value("scores", [1, batch, 3]), value("state_out", [2, batch, 3]), value("used", [])],
        {"axes": np.array([0], np.int64)},
    )


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> list[Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def axes_of(model: onnx.ModelProto, **declared: int) -> batch_axes.BatchAxes:
    pairs = states.find(signature.inputs(model), signature.outputs(model), declared={})
    return batch_axes.find(model, declared=declared, states=pairs)


@pytest.mark.parametrize("batch", ["N", "batch_size", "", 1])
def test_the_batch_is_found_whatever_its_axis_is_called(batch: str | int) -> None:
    found = axes_of(stepper(batch))
    assert found.inputs == {"x": 0, "state": 1, "rate": None}
    assert found.outputs == {"scores": 1 if batch != 1 else 0, "state_out": 1, "used": None}
    assert found.states == {"state": "state_out"}


def test_an_output_that_grows_with_the_batch_but_is_not_the_batch_belongs_to_one_sample() -> None:
    boxes = built(
        [helper.make_node("NonZero", ["x"], ["found"]), helper.make_node("Transpose", ["found"], ["boxes"])],
        [value("x", ["N", 3])],
        [value("boxes", [None, 2], TensorProto.INT64)],
    )
    assert axes_of(boxes).outputs == {"boxes": None}


def test_what_the_user_declares_stands_and_must_exist() -> None:
    assert axes_of(stepper(), scores=2).outputs["scores"] == 2
    with pytest.raises(ConfigError, match=r"'nothing' is no input or output of the model.*x, state, rate"):
        axes_of(stepper(), nothing=0)
    with pytest.raises(ConfigError, match="'state' has 3 axes, there is no axis 3"):
        axes_of(stepper(), state=3)


@pytest.mark.parametrize("batch", ["N", 1])
def test_the_graph_with_its_batch_first_computes_the_same(batch: str | int) -> None:
    model = stepper(batch)
    made = batch_axes.batch_first(model, axes_of(model))
    onnx.checker.check_model(made)
    rng = np.random.default_rng(0)
    x, state, rate = (rng.normal(size=shape).astype(np.float32) for shape in ((1, 3), (2, 1, 3), ()))
    scores, after, used = run(model, {"x": x, "state": state, "rate": rate})
    first = run(made, {"x": x, "state": np.moveaxis(state, 1, 0), "rate": rate[np.newaxis]})
    assert np.array_equal(np.moveaxis(first[1], 0, 1), after)
    assert np.array_equal(first[0].ravel(), scores.ravel())
    assert first[2] == used


def test_a_tensor_that_an_inner_graph_reads_is_followed() -> None:
    branch = helper.make_graph(
        [helper.make_node("Neg", ["state"], ["turned"])], "then", [], [value("turned", [2, "N", 3])]
    )
    other = helper.make_graph([helper.make_node("Abs", ["state"], ["kept"])], "else", [], [value("kept", [2, "N", 3])])
    model = built(
        [
            helper.make_node("ReduceSum", ["x"], ["total"], keepdims=0),
            helper.make_node("Greater", ["total", "zero"], ["yes"]),
            helper.make_node("If", ["yes"], ["state_out"], then_branch=branch, else_branch=other),
        ],
        [value("x", ["N", 3]), value("state", [2, "N", 3])],
        [value("state_out", [2, "N", 3])],
        {"zero": np.array(0, np.float32)},
    )
    made = batch_axes.batch_first(model, axes_of(model))
    state = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    feed = {"x": np.ones((2, 3), np.float32), "state": np.moveaxis(state, 1, 0)}
    assert np.array_equal(np.moveaxis(run(made, feed)[0], 0, 1), -state)


def test_a_plain_graph_stays_the_very_same() -> None:
    plain = built([helper.make_node("Relu", ["x"], ["y"])], [value("x", ["N", 3])], [value("y", ["N", 3])])
    assert batch_axes.batch_first(plain, axes_of(plain)) is plain


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ({"input": "output", "state": "stateN"}, {"state": "stateN"}),
        ({"x": "y", "h": "hn", "c": "cn"}, {"h": "hn", "c": "cn"}),
        ({"x": "y", "h0": "h1", "c_in": "c_out"}, {"h0": "h1", "c_in": "c_out"}),
        ({"x": "y", "past_key": "present_key"}, {"past_key": "present_key"}),
        ({"image": "image_out"}, {}),
        ({"image": "scores", "mask": "logits"}, {}),
    ],
)
def test_states_are_known_by_their_names(pairs: dict[str, str], found: dict[str, str]) -> None:
    taken = [TensorInfo(name=name, shape=(1, None, 4), dtype="float32") for name in pairs]
    given = [TensorInfo(name=name, shape=(1, None, 4), dtype="float32") for name in pairs.values()]
    assert states.find(taken, given, declared={}) == found


def test_a_declared_state_must_come_out_as_it_goes_in() -> None:
    taken = [TensorInfo(name="h", shape=(1, 4), dtype="float32")]
    given = [TensorInfo(name="y", shape=(1, 5), dtype="float32")]
    with pytest.raises(ConfigError, match="'h' and 'y' have different shapes or dtypes: float32 1x4, float32 1x5"):
        states.find(taken, given, declared={"h": "y"})
    with pytest.raises(ConfigError, match=r"'z' is no output of the model.*It has y"):
        states.find(taken, given, declared={"h": "z"})


@given(axis=st.integers(0, 2), order=st.permutations(range(3)))
def test_a_specification_in_the_callers_axes_leads_to_the_same_file(axis: int, order: list[int]) -> None:
    sizes = (5, 2, 3)
    made = TensorSpec(
        name="t",
        shape=(None, 2, 3),
        dtype="float32",
        file=FileTensor(
            name="t", index=0, shape=tuple(sizes[at] for at in order), dtype="float32", permutation=tuple(order)
        ),
    )
    own = batch_axes.in_own_axes(made, axis)
    first = np.arange(30).reshape(sizes)
    mine = np.moveaxis(first, 0, axis)
    assert [size or 5 for size in own.shape] == list(mine.shape)
    assert np.array_equal(mine.transpose(own.file.permutation or range(3)), first.transpose(order))


STATE = TensorInfo(name="state", shape=(None, 2, 3), dtype="float32", batch_axis=1)
FRAME = TensorInfo(name="x", shape=(None, 4), dtype="float32")
RATE = TensorInfo(name="rate", shape=(None,), dtype="int64", batch_axis=NO_BATCH)


def dataset(folder: Path, **arrays: Array) -> Dataset:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "scratch").mkdir()
    return Dataset(folder, folder / "scratch", role="evaluation")


@pytest.mark.parametrize("own", [True, False])
def test_a_state_may_lie_as_the_model_has_it_or_with_its_samples_first(tmp_path: Path, own: bool) -> None:
    state = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    given = np.moveaxis(state, 0, 1) if own else state
    data = dataset(tmp_path, x=np.zeros((5, 4), np.float32), state=given, rate=np.int64(16000))
    bound = data.bind([FRAME, STATE, RATE], {"state": "stateN"})
    assert bound.samples == 5
    assert bound.steps is None
    assert np.array_equal(np.load(bound.arrays["state"]), state)
    assert np.load(bound.arrays["rate"]).tolist() == [16000] * 5


def test_sequences_become_steps_where_the_state_is_left_out(tmp_path: Path) -> None:
    frames = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    data = dataset(tmp_path, x=frames, rate=np.array([8000]), label=np.array([[0, 1, 0], [1, 1, 0]]))
    bound = data.bind([FRAME, STATE, RATE], {"state": "stateN"})
    assert (bound.samples, bound.steps) == (6, 3)
    assert np.array_equal(np.load(bound.arrays["x"]), frames.reshape(6, 4))
    assert bound.label is not None
    assert np.load(bound.label).tolist() == [0, 1, 0, 1, 1, 0]


def test_lengths_that_disagree_are_told_by_name(tmp_path: Path) -> None:
    data = dataset(tmp_path, x=np.zeros((5, 4), np.float32), state=np.zeros((2, 6, 3), np.float32))
    with pytest.raises(DatasetError, match="different numbers of samples: state 6, x 5"):
        data.bind([FRAME, STATE])
    other = TensorInfo(name="state", shape=(None, 2, 7), dtype="float32", batch_axis=1)
    with pytest.raises(DatasetError, match="'state' has shape 2x6x3, the model takes 2xsamplesx7"):
        data.bind([FRAME, other])


def test_samples_of_free_length_are_filled_up_to_the_longest(tmp_path: Path) -> None:
    parts = [np.ones((1, 2, 3), np.float32), np.ones((2, 4, 3), np.float32), np.ones((1, 1, 3), np.float32)]
    with NpyWriter(tmp_path / "free.npy", 4) as writer:
        for part in parts:
            writer.add(part)
    made = np.load(tmp_path / "free.npy")
    assert made.shape == (4, 4, 3)
    assert made.sum(axis=(1, 2)).tolist() == [6, 12, 12, 3]

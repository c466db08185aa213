"""Golden vectors fit their budget, mean the same on both sides, and still refuse what is damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from kedge.evaluation import golden_size, golden_task
from kedge.evaluation.dataset import Data
from kedge.evaluation.worker_messages import GoldenRequest, Program
from kedge_protocol import golden
from kedge_protocol.bundle.config import FileTensor, TensorSpec
from kedge_protocol.errors import BundleError, VerificationError
from kedge_protocol.golden_coding import CodedInput, checksums, code

Array = np.ndarray

SHAPES = arrays.array_shapes(min_dims=2, max_dims=3, max_side=34)


@given(values=arrays.arrays(np.int64, SHAPES, elements=st.integers(-(2**62), 2**62)))
def test_integers_keep_every_bit(values: Array) -> None:
    coded = code(values, eight_bits=True)
    assert np.array_equal(coded.decoded(), values)
    assert coded.decoded().dtype == values.dtype
    assert coded.codes.nbytes <= values.nbytes


@given(
    values=arrays.arrays(np.float32, SHAPES, elements=st.floats(-100, 100, width=32)), step=st.sampled_from([1, 2, 8])
)
def test_floats_are_near_and_within_their_range(values: Array, step: int) -> None:
    made = code(values, eight_bits=True, step=step).decoded()
    assert made.shape == values.shape
    assert made.dtype == values.dtype
    assert made.min() >= values.min() - 1e-3
    assert made.max() <= values.max() + 1e-3
    if step == 1:
        assert np.abs(made - values).max() <= (values.max() - values.min()) / 500 + 1e-4


def test_whole_numbers_of_a_picture_stay_what_they_are() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (2, 3, 40, 40)).astype(np.float32)
    coded = code(picture, eight_bits=True)
    assert coded.codes.dtype == np.uint8
    assert np.array_equal(coded.decoded(), picture)


def test_a_row_has_the_same_code_alone() -> None:
    values = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    coded = code(values, eight_bits=True, step=2)
    again = CodedInput.of(coded.rows([3, 1]).codes, coded.rows([3, 1]).how())
    assert np.array_equal(again.decoded(), coded.decoded()[[3, 1]])


@given(size=st.integers(1, 400), count=st.integers(1, 70), at=st.integers(0, 399), change=st.floats(-9, 9))
def test_a_change_of_any_element_changes_one_checksum_by_as_much(size: int, count: int, at: int, change: float) -> None:
    before = np.random.default_rng(size).normal(size=(1, size))
    after = before.copy()
    after[0, at % size] += change
    moved = np.abs(checksums(after, count) - checksums(before, count))
    assert np.count_nonzero(moved > 1e-9) <= 1
    assert moved.sum() == pytest.approx(abs(change), abs=1e-9)


def test_damaged_codes_are_refused_in_one_way(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    coded = code(values, eight_bits=True)
    whole = golden.Golden({"x": coded.decoded()}, {"y": values}, {"y": golden.Tolerance(0, 0)}, {"x": coded})
    golden.save(whole, tmp_path / "g.npz")
    assert np.array_equal(golden.load(tmp_path / "g.npz").inputs["x"], coded.decoded())
    for bad in (CodedInput(coded.codes, (2**20, 2**20), "float32"), CodedInput(coded.codes, (64,), "nothing")):
        golden.save(golden.Golden(whole.inputs, whole.outputs, whole.tolerances, {"x": bad}), tmp_path / "b.npz")
        with pytest.raises(BundleError, match="cannot be read as golden vectors"):
            golden.load(tmp_path / "b.npz")


def detector(seed: int = 0) -> onnx.ModelProto:
    """Pictures [N, 3, 160, 160] of 300 KiB each, answers of 200 KiB, 12 KiB of weights."""
    rng = np.random.default_rng(seed)
    stored = {
        "a": rng.normal(size=(16, 3, 3, 3)).astype(np.float32) * 0.3,
        "b": rng.normal(size=(8, 16, 3, 3)).astype(np.float32) * 0.1,
        "bias": rng.normal(size=8).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "a"], ["c"], pads=[1] * 4, strides=[2, 2]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "b", "bias"], ["boxes"], pads=[1] * 4),
        ],
        "detector",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", 3, 160, 160])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", 8, 80, 80])],
        [numpy_helper.from_array(array, name) for name, array in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def spec(name: str, shape: tuple[int | None, ...]) -> TensorSpec:
    return TensorSpec(
        name=name, shape=shape, dtype="float32", file=FileTensor(name=name, index=0, shape=shape, dtype="float32")
    )


def test_large_pictures_and_answers_fit_and_each_damage_is_refused(tmp_path: Path) -> None:
    onnx.save(detector(), tmp_path / "model.onnx")
    pictures = np.random.default_rng(1).normal(size=(20, 3, 20, 20)).astype(np.float32)
    np.save(tmp_path / "x.npy", np.kron(pictures, np.ones((1, 1, 8, 8), np.float32)))
    program = Program(
        folder=str(tmp_path),
        backend="onnxruntime",
        entry="model.onnx",
        options={},
        inputs=(spec("images", (None, 3, 160, 160)),),
        outputs=(spec("boxes", (None, 8, 80, 80)),),
    )
    request = GoldenRequest(
        program=program,
        eight_bits=False,
        data=Data(arrays={"images": str(tmp_path / "x.npy")}, samples=20),
        batch=8,
        file=str(tmp_path / "golden.npz"),
        budget=golden_size.budget(12 << 10),
    )
    answer = golden_task.make_golden(request, lambda what, done, total: None)
    assert (tmp_path / "golden.npz").stat().st_size <= 64 << 10
    assert answer.samples >= 8
    assert "checksums of boxes" in answer.form
    vectors = golden.load(tmp_path / "golden.npz")

    def holds(model: onnx.ModelProto) -> bool:
        onnx.save(model, tmp_path / "model.onnx")
        return all(one.holds for one in golden.compare(vectors, program.open().on_samples(vectors.inputs)))

    assert holds(detector())
    for index, stored in enumerate(detector().graph.initializer):
        values = numpy_helper.to_array(stored)
        for damaged in (values * 0, values * 1.01, np.roll(values, 1), values + 1e-3):
            model = detector()
            model.graph.initializer[index].CopyFrom(numpy_helper.from_array(damaged.astype(np.float32), stored.name))
            assert not holds(model), stored.name
    with pytest.raises(VerificationError, match="gave shape"):
        golden.compare(vectors, {"boxes": np.zeros((answer.samples, 8, 80, 81), np.float32)})


def test_what_is_small_stays_whole() -> None:
    small = {"x": np.zeros((1, 16), np.float32)}
    form = golden_size.form(small, [np.zeros((1, 4), np.float32)], [spec("y", (None, 4))], most=64 << 10)
    assert (form.samples, form.eight_bits, form.checksums, form.words) == (16, False, {}, "")

"""What is computed at positions of padding is read by nothing, and counts in no statistic of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from kedge.step import Context
from kedge.steps.correct_bias import CorrectBias, CorrectBiasOptions
from kedge_targets.graph import fakequant, gptq, library, padding, qonnx
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]

SAMPLES, LENGTH, WIDTH = 32, 12, 16
PLAN = Plan(default=Precision.INT8)


class Samples:
    samples = SAMPLES

    def __init__(self, feed: dict[str, Array]) -> None:
        self._feed = feed

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        for start in range(0, SAMPLES, size):
            yield {name: array[start : start + size] for name, array in self._feed.items()}


def masked(*, flat: bool) -> onnx.ModelProto:
    """One layer over each token (``flat``: over the tokens of all samples in a row), whose padding is hidden."""
    weight = np.random.default_rng(1).standard_normal((WIDTH, WIDTH)).astype(np.float32)
    rows, shape = np.array([-1, WIDTH], np.int64), np.array([-1, LENGTH, WIDTH], np.int64)
    nodes = [
        helper.make_node("Reshape", ["x", "rows" if flat else "shape"], ["tokens"], name="in"),
        helper.make_node("MatMul", ["tokens", "w"], ["product"], name="layer"),
        helper.make_node("Reshape", ["product", "shape"], ["back"], name="out"),
        helper.make_node("Cast", ["attention_mask"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["float", "last"], ["column"], name="column"),
        helper.make_node("Mul", ["back", "column"], ["y"], name="hide"),
    ]
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        nodes,
        "g",
        [
            value("x", TensorProto.FLOAT, ["N", LENGTH, WIDTH]),
            value("attention_mask", TensorProto.INT64, ["N", LENGTH]),
        ],
        [value("y", TensorProto.FLOAT, ["N", LENGTH, WIDTH])],
        [
            numpy_helper.from_array(array, name)
            for name, array in (("w", weight), ("rows", rows), ("shape", shape), ("last", np.array([2], np.int64)))
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def feeds() -> dict[str, Array]:
    """Mostly padding, all of it the same vector, as the token of padding gives."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((SAMPLES, LENGTH, WIDTH)).astype(np.float32)
    mask = (np.arange(LENGTH) < rng.integers(2, 5, SAMPLES)[:, None]).astype(np.int64)
    x[mask == 0] = rng.standard_normal(WIDTH).astype(np.float32)
    return {"x": x, "attention_mask": mask}


def run(model: onnx.ModelProto, feed: dict[str, Array]) -> Array:
    session = library.load().InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answer: Array = session.run(None, feed)[0]
    return answer


@pytest.mark.parametrize("flat", [False, True])
def test_a_bias_is_corrected_by_the_mean_error_of_real_tokens(flat: bool, tmp_path: Path) -> None:
    model, feed = masked(flat=flat), feeds()
    context = Context(teacher=model, samples=Samples(feed), plan=PLAN, workdir=tmp_path)
    made = CorrectBias(CorrectBiasOptions()).apply(model, context)
    wanted, real = run(model, feed), feed["attention_mask"] != 0

    def shift(one: onnx.ModelProto) -> float:
        found = fakequant.calibrate(one, PLAN, Samples(feed).batches(8))
        rounded = qonnx.expand_qonnx(fakequant.insert_quantizers(one, PLAN, found))
        return float(np.abs((run(rounded, feed) - wanted)[real].mean(axis=0)).max())

    assert shift(made) < 0.1 * shift(model)


@pytest.mark.parametrize("flat", [False, True])
def test_weights_are_rounded_for_real_tokens(flat: bool) -> None:
    model, feed = masked(flat=flat), feeds()
    found = gptq.products(model, [feed], {"layer": Precision.INT4})["layer"]
    rows = feed["x"][feed["attention_mask"] != 0]
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    np.testing.assert_allclose(found[0], rows.T @ rows, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "mask", "shape", "rows"),
    [
        ("attention_mask", [[1, 1, 0], [1, 0, 0]], (2, 3, 8), [1, 1, 0, 1, 0, 0]),
        ("attention_mask", [[1, 1, 0], [1, 0, 0]], (6, 8), [1, 1, 0, 1, 0, 0]),
        ("mask", [[True, False]], (1, 2, 4), [1, 0]),
        ("attention_mask", [[1, 1, 0], [1, 0, 0]], (2, 8), None),  # one vector for each sample
        ("attention_mask", [[1, 1, 0], [1, 0, 0]], (2, 4, 3, 8), None),
        ("attention_mask", [[0, 0, 0]], (1, 3, 8), None),  # no token is real
        ("key_padding_mask", [[0, 0, 1]], (1, 3, 8), None),  # it may mark the padding
        ("input_ids", [[5, 6, 0]], (1, 3, 8), None),
    ],
)
def test_an_attention_mask_says_which_rows_are_real(
    name: str, mask: list[list[int]], shape: tuple[int, ...], rows: list[int] | None
) -> None:
    found = padding.real_rows({name: np.array(mask)}, shape)
    assert (None if found is None else found.astype(int).tolist()) == rows

"""Which evaluation samples changed most, what they look like, and which layer moved them."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.support.networks import Fed
from tests.support.odd_graphs import ODD

from kedge.evaluation import changes, preview
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.quantization.layer_attribution import most_altering
from kedge_targets.numerics import Precision

Array = np.ndarray[Any, Any]


def seen(kind: OutputKind, name: str = "y", **more: Any) -> dict[str, ClassifiedOutput]:
    return {name: ClassifiedOutput(name=name, kind=kind, why="the test says so", **more)}


def test_other_answers_come_first_then_the_largest_errors_and_what_is_equal_is_left_out() -> None:
    rng = np.random.default_rng(0)
    wanted = rng.random((40, 3)) * 0.1
    wanted[:, 0] = 1.0
    got = wanted.copy()
    got[7] = (0.0, 0.4, 0.6)  # another answer
    got[3, 1] += 0.5  # the same answer, a large error
    got[9, 1] += 0.2
    found = changes.largest(seen(OutputKind.CLASSES), {"y": got}, {"y": wanted})
    assert [one.sample for one in found] == [7, 3, 9]
    assert [one.flipped for one in found] == [True, False, False]
    assert found[0].outputs[0].before.startswith("0 (1)")
    assert found[0].outputs[0].after.startswith("2 (0.6), 1 (0.4)")
    assert len(changes.largest(seen(OutputKind.CLASSES), {"y": rng.random((40, 3))}, {"y": wanted})) == 10


def test_scores_beside_boxes_are_seen_and_every_output_counts() -> None:
    rng = np.random.default_rng(1)
    wanted = np.concatenate([rng.random((6, 4, 20)) * 300, np.full((6, 3, 20), 0.01)], axis=1)
    wanted[:, 5, :4] = 0.9
    got = wanted.copy()
    got[2, 4:] = 0.0  # the scores of one sample are lost, the boxes are whole
    kinds = seen(OutputKind.BOXES, bounded=True)
    (found,) = changes.largest(kinds, {"y": got}, {"y": wanted})
    assert (found.sample, found.outputs[0].error > 0.99) == (2, True)
    assert found.outputs[0].before == "axis 1: 4-6: 0.01 to 0.9, mean 0.0693, 4 above 0.5"
    assert found.outputs[0].after == "axis 1: 4-6: 0 to 0, mean 0, 0 above 0.5"
    both = kinds | seen(OutputKind.PASSED_THROUGH, "ids")
    outputs = {"y": got, "ids": np.zeros((6, 2), dtype=np.int64)}
    assert len(changes.largest(both, outputs, {"y": wanted, "ids": outputs["ids"] + 1})) == 1


def test_nothing_finite_and_texts_are_told_in_words() -> None:
    wanted = np.ones((2, 8))
    got = wanted.copy()
    got[1] = np.nan
    (found,) = changes.largest(seen(OutputKind.VALUES), {"y": got}, {"y": wanted})
    assert (found.sample, found.outputs[0].after) == (1, "nothing finite")
    words = np.asarray(["cat", "dog"])
    (found,) = changes.largest(seen(OutputKind.INTEGERS), {"y": np.asarray(["cat", "cow"])}, {"y": words})
    assert (found.outputs[0].before, found.outputs[0].after, found.flipped) == ("dog", "cow", True)


def test_answers_of_another_length_are_changes() -> None:
    wanted = np.zeros((4, 2, 9), dtype=np.int64)  # the longest of the float model has nine, of the bundle ten
    got = np.zeros((4, 2, 10), dtype=np.int64)
    got[2, :, 9] = 7
    (found,) = changes.largest(seen(OutputKind.INTEGERS), {"y": got}, {"y": wanted})
    assert (found.sample, found.outputs[0].same) == (2, 0.9)


def test_pictures_sounds_and_texts_have_previews() -> None:
    from PIL import Image

    rng = np.random.default_rng(2)
    picture = rng.integers(0, 256, (20, 30, 3)).astype(np.uint8)
    (shown,) = preview.of({"x": picture})
    data = base64.b64decode(shown.content.partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)
    (grey,) = preview.of({"x": rng.normal(size=(1, 200, 100)).astype(np.float32)})
    data = base64.b64decode(grey.content.partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (34, 67)
    assert preview.of({"x": np.sin(np.arange(16000))})[0].form is preview.Form.SOUND
    assert preview.of({"x": np.asarray(["hello there"])})[0].content == "hello there"
    assert preview.of({"x": np.arange(8.0)})[0].content == "0, 1, 2, 3, 4, 5, … (8)"


class Calibration:
    """A few samples of a given shape."""

    samples = 8

    def batches(self, size: int) -> Any:
        rng = np.random.default_rng(3)
        for start in range(0, self.samples, size):
            yield {"x": rng.normal(size=(min(size, self.samples - start), 4)).astype(np.float32)}

    def __iter__(self) -> Any:
        return self.batches(1)


def test_the_layer_that_moves_a_sample_is_named() -> None:
    rng = np.random.default_rng(4)
    weights = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in ("first", "second")}
    weights["first"][0] *= 300.0  # one row stretches the range of all: the others round to nothing
    nodes = [
        helper.make_node("MatMul", ["x", "first.w"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("MatMul", ["b", "second.w"], ["y"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(value, f"{name}.w") for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    # Without its first number a sample does not see the row that is stretched.
    picked = [{"x": np.asarray([[0.0, 1.0, -1.0, 0.5]], dtype=np.float32)}]
    assert most_altering(model, Calibration(), picked, Precision.INT4) == ["first"]
    assert most_altering(model, Calibration(), picked, Precision.INT4, floating=["first"]) == ["second"]


def test_the_layer_is_named_though_a_branch_holds_others() -> None:
    odd = ODD["branches"]()
    calibration, picked = Fed(**{odd.input: odd.samples(8, seed=1)}), {odd.input: odd.samples(1)}
    (layer,) = most_altering(odd.model, calibration, [picked], Precision.INT8)
    assert layer == "Conv_a"


def test_the_layer_is_named_though_an_output_is_constant() -> None:
    odd = ODD["constant beside answers"]()
    calibration, picked = Fed(**{odd.input: odd.samples(8, seed=1)}), {odd.input: odd.samples(1)}
    (layer,) = most_altering(odd.model, calibration, [picked], Precision.INT8)
    assert layer == "Conv_a"

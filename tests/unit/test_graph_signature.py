"""Inputs, outputs, layout and batch of a graph as plain data; writing it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from tests.support.lowering import classifier, float_answers, images

from kedge_protocol.errors import ModelError, StorageError
from kedge_targets.graph import batch, layout, library, model_reader, model_writer, opsets, signature


def test_inputs_and_outputs_as_plain_data() -> None:
    model = classifier()
    assert signature.inputs(model) == [
        signature.TensorInfo(name="image", shape=(None, 3, 8, 8), dtype="float32", layout="NCHW")
    ]
    assert signature.outputs(model) == [signature.TensorInfo(name="score", shape=(None, 4), dtype="float32")]


def test_specifications_say_that_the_file_is_as_the_model() -> None:
    (spec,) = signature.specs(signature.inputs(classifier()))
    assert (spec.name, spec.shape, spec.dtype, spec.layout) == ("image", (None, 3, 8, 8), "float32", "NCHW")
    assert (spec.file.name, spec.file.index, spec.file.shape) == ("image", 0, (None, 3, 8, 8))
    assert spec.file.permutation is None
    assert spec.file.scale is None


def test_an_input_without_a_shape_is_an_error() -> None:
    model = classifier()
    model.graph.input[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match=r"'image'.*no shape"):
        signature.inputs(model)


def test_an_input_that_is_no_tensor_is_an_error() -> None:
    model = classifier()
    element = helper.make_tensor_type_proto(TensorProto.FLOAT, [1])
    model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(element))
    with pytest.raises(ModelError, match="not a tensor"):
        signature.inputs(model)


def before_convolution(rank: int, *steps: tuple[str, tuple[int, ...] | None]) -> onnx.ModelProto:
    """Operators of one input and one output from ``x`` to a Conv."""
    made, tensor = [], "x"
    for index, (operator, permutation) in enumerate(steps):
        given = {} if permutation is None else {"perm": permutation}
        made.append(helper.make_node(operator, [tensor], [f"s{index}"], **given))
        tensor = f"s{index}"
    weight = numpy_helper.from_array(np.ones((1,) * rank, np.float32), "w")
    made.append(helper.make_node("Conv", [tensor, "w"], ["y"]))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        made, "g", [value("x", TensorProto.FLOAT, [2] * rank)], [value("y", TensorProto.FLOAT, None)], [weight]
    )
    return helper.make_model(graph)


@pytest.mark.parametrize(
    ("rank", "steps", "expected"),
    [
        (4, [], "NCHW"),
        (4, [("Transpose", (0, 3, 1, 2))], "NHWC"),
        (4, [("Relu", None), ("Transpose", (0, 3, 1, 2)), ("Tanh", None)], "NHWC"),
        (4, [("Transpose", (0, 3, 1, 2)), ("Transpose", (0, 2, 3, 1))], "NCHW"),
        (3, [("Transpose", (0, 2, 1))], "NWC"),
        (5, [("Transpose", (0, 4, 1, 2, 3))], "NDHWC"),
        (4, [("Softmax", None)], None),
        (2, [], None),
    ],
)
def test_the_layout_is_told_by_the_first_convolution(
    rank: int, steps: list[tuple[str, tuple[int, ...] | None]], expected: str | None
) -> None:
    assert layout.layout_of(before_convolution(rank, *steps), "x") == expected


@given(st.permutations(range(4)), st.permutations(range(4)))
def test_transpositions_add_up(first: list[int], second: list[int]) -> None:
    found = layout.layout_of(before_convolution(4, ("Transpose", tuple(first)), ("Transpose", tuple(second))), "x")
    moved = np.array(list(found or "")).reshape(4)[first][second]
    assert "".join(moved) == "NCHW"


def test_the_weight_of_a_convolution_tells_nothing() -> None:
    model = before_convolution(4)
    model.graph.node[0].input[0], model.graph.node[0].input[1] = "w", "x"
    assert layout.layout_of(model, "x") is None


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "expected"),
    [("ic_resnet8.onnx", "NHWC"), ("kws_dscnn.onnx", "NHWC"), ("mnist_cnn.onnx", "NCHW")],
)
def test_layouts_of_real_models(shared_data: Path, name: str, expected: str) -> None:
    (info,) = signature.inputs(model_reader.read(shared_data / "models" / name))
    assert info.layout == expected


def test_a_free_batch_is_fixed_everywhere(tmp_path: Path) -> None:
    model = model_reader.infer_shapes(classifier(), where="model")
    assert batch.size(model) is None
    fixed = batch.fix_batch(model, 3)
    assert batch.size(fixed) == 3
    assert signature.outputs(fixed)[0].shape == (3, 4)
    assert batch.size(model) is None
    path = tmp_path / "fixed.onnx"
    model_writer.save(fixed, path)
    samples = images(3)
    model_writer.save(model, tmp_path / "free.onnx")
    np.testing.assert_array_equal(float_answers(path, samples), float_answers(tmp_path / "free.onnx", samples))


def test_a_fixed_batch_is_not_fixed_to_another_size() -> None:
    model = classifier(batch=2)
    assert batch.size(batch.fix_batch(model, 2)) == 2
    with pytest.raises(ModelError, match="fixed to 2, not 3"):
        batch.fix_batch(model, 3)


def test_inputs_whose_first_axes_disagree() -> None:
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [5, 2]))
    with pytest.raises(ModelError, match="image free, other 5"):
        batch.size(model)


@given(st.integers(1, 20), st.integers(1, 7))
def test_samples_are_grouped_to_the_batch_and_none_is_lost(count: int, at_once: int) -> None:
    samples = [{"x": np.array([index])} for index in range(count)]
    groups = [group["x"] for group in batch.regroup(samples, at_once)]
    assert all(len(group) == at_once for group in groups)
    flat = np.concatenate(groups)
    assert flat[:count].tolist() == list(range(count))
    assert set(flat[count:]) <= {count - 1}
    assert len(flat) - count < at_once


def test_writing_takes_the_lowest_ir_version_and_the_same_bytes(tmp_path: Path) -> None:
    model = classifier(ir_version=12)
    model_writer.save(model, tmp_path / "a.onnx")
    assert onnx.load_model(str(tmp_path / "a.onnx")).ir_version == 8
    model_writer.save(onnx.load_model(str(tmp_path / "a.onnx")), tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_stripping_leaves_what_runs_and_no_path(tmp_path: Path) -> None:
    model = model_reader.infer_shapes(classifier(), where="model")
    model.doc_string = model.graph.doc_string = model.graph.node[0].doc_string = "made in /home/somebody"
    model.graph.node[1].metadata_props.add(key="trace", value="/home/somebody/train.py:1")
    model.metadata_props.add(key="path", value="/home/somebody")
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model_writer.save(model, tmp_path / "full.onnx")
    model_writer.strip(model)
    model_writer.save(model, tmp_path / "lean.onnx")
    raw = (tmp_path / "lean.onnx").read_bytes()
    assert b"somebody" not in raw
    assert len(raw) < (tmp_path / "full.onnx").stat().st_size
    assert [opset.domain for opset in model.opset_import] == [""]
    samples = images(2)
    np.testing.assert_array_equal(
        float_answers(tmp_path / "lean.onnx", samples), float_answers(tmp_path / "full.onnx", samples)
    )


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be written"):
        model_writer.save(classifier(), tmp_path / "absent" / "model.onnx")


def test_an_old_opset_is_brought_up_with_equal_answers(tmp_path: Path) -> None:
    old = classifier(opset=9, ir_version=4)
    new = opsets.raise_opset(old, 13, where="model")
    assert (opsets.version(old), opsets.version(new)) == (9, 13)
    assert opsets.raise_opset(new, 11, where="model") is new
    for name, model in (("old", old), ("new", new)):
        model_writer.save(model, tmp_path / f"{name}.onnx")
    samples = images(2)
    np.testing.assert_allclose(
        float_answers(tmp_path / "old.onnx", samples), float_answers(tmp_path / "new.onnx", samples), atol=1e-6
    )


def test_loading_the_runtime_switches_its_telemetry_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    library.load()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"

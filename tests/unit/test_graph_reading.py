"""Reading an ONNX file: whatever is wrong is one clear error."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from tests.support.lowering import classifier

from kedge_protocol.errors import ModelError, UnsupportedOperatorError
from kedge_targets.graph import library, model_reader, signature


def saved(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def test_a_good_model_is_read_with_its_shapes(tmp_path: Path) -> None:
    path = saved(classifier(), tmp_path / "model.onnx")
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    model = model_reader.read(path)
    shapes = {value.name: len(value.type.tensor_type.shape.dim) for value in model.graph.value_info}
    assert shapes["c1"] == 4
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    assert model_reader.read(saved(classifier(), tmp_path / "model.json")).graph.node


@pytest.mark.parametrize("content", [b"", b"hello, this is no model", b"PK\x03\x04" + bytes(200), bytes(1000)])
def test_a_file_that_is_no_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx: is not an ONNX model"):
        model_reader.read(path)


def test_a_truncated_file(tmp_path: Path) -> None:
    whole = classifier().SerializeToString()
    path = tmp_path / "model.onnx"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError):
        model_reader.read(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        model_reader.read(tmp_path / "absent.onnx")


def test_missing_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save_model(classifier(), str(path), save_as_external_data=True, location="weights.data", size_threshold=0)
    assert model_reader.read(path).graph.initializer[0].raw_data
    (tmp_path / "weights.data").unlink()
    with pytest.raises(ModelError, match="external data cannot be read"):
        model_reader.read(path)


def test_an_ir_version_too_new_is_named_with_the_limit_and_the_remedy(tmp_path: Path) -> None:
    path = saved(classifier(ir_version=99), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"IR version 99, .* takes up to \d+\. Set model\.ir_version = \d+"):
        model_reader.read(path)


def test_an_opset_too_new_is_named_with_the_limit_and_the_remedy(tmp_path: Path) -> None:
    path = saved(classifier(opset=99), tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"opset 99 of ai\.onnx, .* takes up to \d+\. Export it with opset \d+"):
        model_reader.read(path)


def test_the_limits_are_the_runtimes_own(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model_reader.read(saved(classifier(opset=99), tmp_path / "model.onnx"))
    limit = int(str(caught.value).split("opset ")[-1].split(" ")[0])
    assert model_reader.read(saved(classifier(opset=limit), tmp_path / "model.onnx"))
    with pytest.raises(ModelError):
        model_reader.read(saved(classifier(opset=limit + 1), tmp_path / "model.onnx"))


@pytest.mark.parametrize(("operator", "domain"), [("Convv", ""), ("FloatQuant", "qonnx.custom_op.general")])
def test_an_unknown_operator_is_named_with_its_domain_and_node(tmp_path: Path, operator: str, domain: str) -> None:
    model = classifier()
    model.graph.node[2].op_type, model.graph.node[2].domain = operator, domain
    with pytest.raises(UnsupportedOperatorError) as caught:
        model_reader.read(saved(model, tmp_path / "model.onnx"))
    text = str(caught.value)
    assert operator in text
    assert (domain or "ai.onnx") in text
    assert "'second'" in text


def test_an_unknown_operator_in_a_branch_is_found(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Bogus", ["score"], ["out"], name="inner")],
        "branch",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
    )
    model = classifier()
    model.graph.node.append(
        helper.make_node("If", ["flag"], ["chosen"], name="outer", then_branch=branch, else_branch=branch)
    )
    with pytest.raises(UnsupportedOperatorError, match=r"'inner'.*'Bogus'"):
        model_reader.check(model, where="model")


def test_operators_that_the_runtime_brings_itself_are_known(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[1].op_type, model.graph.node[1].domain = "Gelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert model_reader.read(saved(model, tmp_path / "model.onnx"))


def test_a_broken_structure_is_told_in_the_checkers_words(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[4].input[0] = "nothing_makes_this"
    with pytest.raises(ModelError, match=r"not a valid ONNX model.*nothing_makes_this"):
        model_reader.read(saved(model, tmp_path / "model.onnx"))


def test_contradicting_shapes_are_told_in_the_runtimes_words(tmp_path: Path) -> None:
    model = classifier()
    model.graph.initializer[4].dims[:] = [2, 32]
    with pytest.raises(ModelError, match=r"refuses it: .*last.*Gemm"):
        model_reader.read(saved(model, tmp_path / "model.onnx"))


def test_an_operator_without_a_kernel_is_named_with_its_node(tmp_path: Path) -> None:
    # ONNX allows LRN of doubles, ONNX Runtime has it for float only.
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("LRN", ["x"], ["y"], name="normalized", size=3)],
        "g",
        [value("x", TensorProto.DOUBLE, [1, 3, 4, 4])],
        [value("y", TensorProto.DOUBLE, [1, 3, 4, 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(UnsupportedOperatorError, match=r"'normalized'.*'LRN'"):
        model_reader.read(saved(model, tmp_path / "model.onnx"))


def test_initializers_listed_as_inputs_become_constants(tmp_path: Path) -> None:
    model = classifier(opset=8, ir_version=3)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))
    path = saved(model, tmp_path / "model.onnx")
    read = model_reader.read(path)
    assert [value.name for value in read.graph.input] == ["image"]
    assert [info.name for info in signature.inputs(model)] == ["image"]
    library.load().InferenceSession(read.SerializeToString())

"""NVIDIA's own parser and builder: what they take, and what they refuse, by node. No GPU is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper
from tests.support.lowering import Calibration, Case, checked_copy, classifier, ic, kws, lower
from tests.support.mobile_network import mobile_network, pictures

from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import ConfigError, LoweringError, UnsupportedOperatorError
from kedge_targets import toolchain
from kedge_targets.backends.tensorrt import parser_check, recipe
from kedge_targets.backends.tensorrt.recipe import FP16, INT8, InputProfile
from kedge_targets.graph import batch, model_reader, model_writer, quantizer_preparation
from kedge_targets.graph.calibration_reader import Samples
from kedge_targets.numerics import Precision
from kedge_targets.toolchain.installation import Versions

pytestmark = pytest.mark.usefixtures("tensorrt_toolchain")

Array = npt.NDArray[Any]
TARGET = "jetson-orin-nano"
WORKSPACE = 1 << 28


@dataclass(frozen=True)
class Network:
    """A model's file, its input, and samples to calibrate on."""

    model: Path
    name: str
    samples: Array


def _mobile(_: Path, folder: Path) -> Network:
    path = folder / "mobile.onnx"
    path.write_bytes(mobile_network().SerializeToString())
    return Network(path, "image", pictures(16))


def _mnist(shared_data: Path, folder: Path) -> Network:
    with np.load(shared_data / "eval" / "mnist_t10k_uint8.npz") as data:
        samples = data["input"][:16].astype(np.float32)
    return Network(shared_data / "models" / "mnist_cnn.onnx", "Input3", samples)


def _of(case: Callable[[Path], Case]) -> Callable[[Path, Path], Network]:
    def make(shared_data: Path, folder: Path) -> Network:
        found = case(shared_data)
        return Network(found.model, "input", found.calibration[:16])

    return make


NETWORKS = [
    pytest.param(_mobile, id="mobile"),
    pytest.param(_of(ic), id="ic_resnet8", marks=pytest.mark.shared_data),
    pytest.param(_of(kws), id="kws_dscnn", marks=pytest.mark.shared_data),
    pytest.param(_mnist, id="mnist_cnn", marks=pytest.mark.shared_data),
]


def test_the_driver_says_what_it_is() -> None:
    with toolchain.find("tensorrt").worker() as worker:
        found = worker.call("version", {}, Versions, deadline=60)
    assert found.packages["tensorrt-rtx-cu13-libs"] == "1.7.1.116"
    assert set(found.packages) == set(parser_check.versions())


@pytest.mark.parametrize("network", NETWORKS)
def test_the_real_parser_and_builder_take_both_precisions(
    shared_data: Path, tmp_path: Path, network: Callable[[Path, Path], Network]
) -> None:
    given = network(shared_data, tmp_path)
    lowered = lower(
        TARGET,
        checked_copy(given.model, tmp_path),
        Precision.INT8,
        Calibration(given.name, given.samples),
        tmp_path / "o",
    )
    assert lowered.verified is Verified.CHECKED
    for precision in (INT8, FP16):
        found = parser_check.check(lowered.files[recipe.FILES[precision]], workspace_bytes=WORKSPACE)
        assert found.accepted
        assert found.errors == ()
        assert found.engine_bytes > 10_000
        assert found.layers > 10


def default_quantization(given: Network, folder: Path, **options: Any) -> Path:
    """The same graph by ONNX Runtime's quantizer with its own settings, or others."""
    from onnxruntime.quantization import quantize_static

    prepared = quantizer_preparation.prepare(
        model_reader.load(checked_copy(given.model, folder)), folder / "p.onnx", quantized=True
    )
    model_writer.save(prepared, folder / "p.onnx")
    calibration = Samples(Calibration(given.name, given.samples), batch.size(prepared))
    quantize_static(folder / "p.onnx", folder / "default.onnx", calibration, **options)
    return folder / "default.onnx"


@pytest.mark.parametrize("network", NETWORKS)
def test_the_default_quantization_of_onnx_runtime_is_refused_by_node(
    shared_data: Path, tmp_path: Path, network: Callable[[Path, Path], Network]
) -> None:
    """So the check can fail: a bias quantized to int32 is what TensorRT does not take."""
    graph = default_quantization(network(shared_data, tmp_path), tmp_path)
    found = parser_check.check(graph, workspace_bytes=WORKSPACE)
    assert not found.accepted
    assert found.engine_bytes == 0
    names = {node.name: node.op_type for node in onnx.load_model(str(graph)).graph.node}
    refusal = found.errors[0]
    assert names[refusal.node] == refusal.operator == "DequantizeLinear"
    assert "Int32" in refusal.what
    with pytest.raises(LoweringError, match=rf"default\.onnx: node '{refusal.node}': TensorRT refuses operator Dequan"):
        parser_check.require(found, where=graph.name)


@pytest.mark.parametrize("kind", ["zero-point", "uint8"])
def test_what_is_not_symmetric_int8_is_refused(tmp_path: Path, kind: str) -> None:
    from onnxruntime.quantization import QuantType

    given = _mobile(tmp_path, tmp_path)
    kinds = {"activation_type": QuantType.QUInt8 if kind == "uint8" else QuantType.QInt8}
    extra = {"QuantizeBias": False, "WeightSymmetric": True, "ActivationSymmetric": kind == "uint8"}
    graph = default_quantization(given, tmp_path, weight_type=QuantType.QInt8, extra_options=extra, **kinds)
    found = parser_check.check(graph, workspace_bytes=WORKSPACE)
    assert not found.accepted
    assert found.errors[0].operator in ("QuantizeLinear", "DequantizeLinear")


def one_node(path: Path, kind: str, shape: list[int | str], out: list[int | str], **attributes: Any) -> Path:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node(kind, ["x"], ["y"], name="the_node", **attributes)],
        "one",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, out)],
    )
    path.write_bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )
    return path


def test_an_operator_that_the_parser_lacks_is_named_with_its_node(tmp_path: Path) -> None:
    found = parser_check.check(one_node(tmp_path / "det.onnx", "Det", [2, 2], []), workspace_bytes=WORKSPACE)
    assert [(error.node, error.operator) for error in found.errors] == [("the_node", "Det")]
    with pytest.raises(UnsupportedOperatorError, match=r"det\.onnx: node 'the_node': TensorRT refuses operator Det"):
        parser_check.require(found, where="det.onnx")


def test_every_refused_node_is_told(tmp_path: Path) -> None:
    path = one_node(tmp_path / "two.onnx", "Det", [2, 2], [])
    model = onnx.load_model(str(path))
    model.graph.node.append(helper.make_node("Det", ["x"], ["z"], name="another"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, []))
    path.write_bytes(model.SerializeToString())
    assert {error.node for error in parser_check.check(path, workspace_bytes=WORKSPACE).errors} == {
        "the_node",
        "another",
    }


def test_the_builder_can_refuse_what_the_parser_took(tmp_path: Path) -> None:
    path = tmp_path / "free.onnx"
    path.write_bytes(classifier().SerializeToString())
    # A free axis without a profile.
    found = parser_check.check(path, workspace_bytes=WORKSPACE)
    assert not found.accepted
    assert found.errors[0].code == "BUILD"
    assert found.errors[0].what
    with pytest.raises(LoweringError, match=r"free\.onnx"):
        parser_check.require(found, where=path.name)
    profile = InputProfile(name="image", minimum=(1, 3, 8, 8), optimum=(1, 3, 8, 8), maximum=(4, 3, 8, 8))
    assert parser_check.check(path, workspace_bytes=WORKSPACE, profiles=(profile,)).accepted


def test_each_gpu_adds_to_the_engine_that_is_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(batch=1).SerializeToString())
    sizes = [
        parser_check.check(path, workspace_bytes=WORKSPACE, capabilities=names).engine_bytes
        for names in (("SM86",), parser_check.CAPABILITIES)
    ]
    assert 0 < sizes[0] < sizes[1]


def test_a_gpu_that_the_builder_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier(batch=1).SerializeToString())
    with pytest.raises(ConfigError, match="'SM87'"):
        parser_check.check(path, workspace_bytes=WORKSPACE, capabilities=("SM87",))


def test_bytes_that_are_no_graph_are_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"nonsense")
    found = parser_check.check(path, workspace_bytes=WORKSPACE)
    assert not found.accepted
    assert found.errors

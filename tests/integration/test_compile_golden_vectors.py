"""Golden vectors can fail: each single damage to a file is refused, while every kernel set passes the whole one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.support.compiling import SHARED_MODELS, SHARED_TARGETS, shared_release, unpacked

from kedge_protocol import codec, errors
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.bundle.layout import parse_config
from kedge_targets import registry
from kedge_targets.proof import ProveAnswer, ProveRequest, prove

pytestmark = [pytest.mark.shared_data, pytest.mark.slow]
MODELS = sorted(SHARED_MODELS)


def proved(folder: Path, kernel_set: str | None = None) -> ProveAnswer:
    request = ProveRequest(folder=str(folder), config=str(folder / "config.json"), kernel_set=kernel_set)
    return prove(request, lambda what, done, total: None)


def held(folder: Path) -> bool:
    """Whether the device would serve it; a file that the runtime refuses does not hold either."""
    try:
        return proved(folder).holds
    except errors.VerificationError:
        return False


def config_of(folder: Path) -> BundleConfig:
    return parse_config((folder / "config.json").read_bytes(), where="test")


def entry_of(folder: Path) -> Path:
    return folder / config_of(folder).entry


@pytest.mark.parametrize("target", SHARED_TARGETS)
@pytest.mark.parametrize("short", MODELS)
def test_every_kernel_set_passes(shared_data: Path, tmp_path: Path, short: str, target: str) -> None:
    release = shared_release(shared_data, short)
    folder = unpacked(release, target, tmp_path)
    config = release.bundles[target].config
    sets = registry.runtime(config.backend).kernel_sets_for(config.runtime_options)
    assert config.golden.kernel_sets == sets
    assert config.golden.samples >= 8
    for name in (None, *sets):
        answer = proved(folder, name)
        assert answer.holds, (name, answer.reason)


def zeroed_onnx(file: Path) -> Iterator[str]:
    """Each weight and bias in turn: constants that a Conv, Gemm or MatMul takes, at once or dequantized."""
    whole = onnx.load(file)
    dequantized = {node.output[0]: node.input[0] for node in whole.graph.node if node.op_type == "DequantizeLinear"}
    taken = [
        dequantized.get(name, name)
        for node in whole.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        for name in node.input[1:]
    ]
    for index, tensor in enumerate(whole.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.name not in taken or not values.any():
            continue
        damaged = onnx.ModelProto()
        damaged.CopyFrom(whole)
        damaged.graph.initializer[index].CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))
        file.write_bytes(damaged.SerializeToString())
        yield tensor.name


def zeroed_tflite(file: Path) -> Iterator[str]:
    """Each constant of 8 or 32 bits that is not a shape, in turn, zeroed in place."""
    from ai_edge_litert import schema_py_generated as schema

    whole = file.read_bytes()
    graph = schema.Model.GetRootAs(whole).Subgraphs(0)
    shaped = ("RESHAPE", "PAD", "TRANSPOSE", "MEAN", "STRIDED_SLICE")
    builtin = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    arguments = set()
    for number in range(graph.OperatorsLength()):
        operator = graph.Operators(number)
        code = schema.Model.GetRootAs(whole).OperatorCodes(operator.OpcodeIndex())
        if builtin[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())].startswith(shaped):
            arguments |= {operator.Inputs(i) for i in range(1, operator.InputsLength())}
    for index in range(graph.TensorsLength()):
        damaged = bytearray(whole)
        model = schema.Model.GetRootAs(damaged)
        tensor = model.Subgraphs(0).Tensors(index)
        data = model.Buffers(tensor.Buffer()).DataAsNumpy()
        if index in arguments or isinstance(data, int) or not data.any():
            continue
        data[:] = 0
        file.write_bytes(damaged)
        yield tensor.Name().decode()


DAMAGES: dict[str, Callable[[Path], Iterator[str]]] = {"generic-cpu": zeroed_onnx, "rpi4": zeroed_tflite}


@pytest.mark.parametrize("target", sorted(DAMAGES))
@pytest.mark.parametrize("short", MODELS)
def test_each_single_zeroed_weight_tensor_is_refused(
    shared_data: Path, tmp_path: Path, short: str, target: str
) -> None:
    folder = unpacked(shared_release(shared_data, short), target, tmp_path)
    names = {name: held(folder) for name in DAMAGES[target](entry_of(folder))}
    assert len(names) >= 18  # kernels and biases of nine layers at least
    assert [name for name, holds in names.items() if holds] == []


def rewritten(folder: Path, change: Callable[[TensorSpec], TensorSpec], *, side: str) -> None:
    config = config_of(folder)
    changed = tuple(change(spec) for spec in getattr(config, side))
    (folder / "config.json").write_bytes(codec.encode(dataclasses.replace(config, **{side: changed})))


def with_file(spec: TensorSpec, **changes: object) -> TensorSpec:
    return dataclasses.replace(spec, file=dataclasses.replace(spec.file, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("target", SHARED_TARGETS)
def test_a_swapped_layout_in_the_configuration_is_refused(shared_data: Path, tmp_path: Path, target: str) -> None:
    folder = unpacked(shared_release(shared_data, "ic"), target, tmp_path)

    def swapped(spec: TensorSpec) -> TensorSpec:
        axes = list(spec.file.permutation or range(4))
        height, width = axes.index(1), axes.index(2)
        axes[height], axes[width] = axes[width], axes[height]
        return with_file(spec, permutation=tuple(axes))

    rewritten(folder, swapped, side="inputs")
    assert not held(folder)


def test_transposed_weights_are_refused(shared_data: Path, tmp_path: Path) -> None:
    folder = unpacked(shared_release(shared_data, "ic"), "generic-cpu", tmp_path)
    whole = onnx.load(entry_of(folder))
    tried = []
    for index, tensor in enumerate(whole.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.ndim != 4 or values.shape[2] < 2:
            continue
        damaged = onnx.ModelProto()
        damaged.CopyFrom(whole)
        turned = np.ascontiguousarray(values.transpose(0, 1, 3, 2))
        damaged.graph.initializer[index].CopyFrom(numpy_helper.from_array(turned, tensor.name))
        entry_of(folder).write_bytes(damaged.SerializeToString())
        tried.append((tensor.name, held(folder)))
    assert len(tried) >= 7
    assert [name for name, holds in tried if holds] == []


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1, 2.0])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("short", MODELS)
def test_a_wrong_scale_in_the_configuration_is_refused(
    shared_data: Path, tmp_path: Path, short: str, side: str, factor: float
) -> None:
    folder = unpacked(shared_release(shared_data, short), "rpi4", tmp_path)
    assert all(spec.file.scale is not None for spec in getattr(config_of(folder), side))
    rewritten(folder, lambda spec: with_file(spec, scale=(spec.file.scale or 0.0) * factor), side=side)
    assert not held(folder)


@pytest.mark.parametrize("short", MODELS)
def test_a_wrong_zero_point_in_the_configuration_is_refused(shared_data: Path, tmp_path: Path, short: str) -> None:
    folder = unpacked(shared_release(shared_data, short), "rpi4", tmp_path)
    rewritten(folder, lambda spec: with_file(spec, zero_point=(spec.file.zero_point or 0) + 16), side="inputs")
    assert not held(folder)


@pytest.mark.parametrize("short", MODELS)
def test_a_wrong_scale_in_the_file_is_refused(shared_data: Path, tmp_path: Path, short: str) -> None:
    folder = unpacked(shared_release(shared_data, short), "generic-cpu", tmp_path)
    whole = onnx.load(entry_of(folder))
    scales = {node.input[1] for node in whole.graph.node if node.op_type == "QuantizeLinear"}
    tried = []
    for index, tensor in enumerate(whole.graph.initializer):
        if tensor.name not in scales:
            continue
        damaged = onnx.ModelProto()
        damaged.CopyFrom(whole)
        wrong = (numpy_helper.to_array(tensor) * 1.5).astype(np.float32)
        damaged.graph.initializer[index].CopyFrom(numpy_helper.from_array(wrong, tensor.name))
        # Quantized with one scale and dequantized with another: only the latter is wrong.
        for node in damaged.graph.node:
            if node.op_type == "QuantizeLinear" and node.input[1] == tensor.name:
                node.input[1] = f"{tensor.name}_right"
        damaged.graph.initializer.add().CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor), f"{tensor.name}_right")
        )
        entry_of(folder).write_bytes(damaged.SerializeToString())
        tried.append((tensor.name, held(folder)))
    assert len(tried) >= 8
    assert [name for name, holds in tried if holds] == []

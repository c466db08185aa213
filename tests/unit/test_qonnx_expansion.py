"""QONNX's nodes as plain operators: equal to the specification, written down here once more in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.graph import library, model_reader, model_writer, opsets, qonnx

Array = npt.NDArray[Any]
F32 = np.float32
VALUES = hnp.arrays(F32, st.tuples(st.integers(1, 6), st.just(4)), elements=st.floats(-300, 300, width=32))
MODES = ["ROUND", "CEIL", "FLOOR", "UP", "DOWN", "HALF_UP", "HALF_DOWN", "round"]


def one_node(
    operator: str,
    constants: dict[str, Any],
    *,
    domain: str = qonnx.DOMAIN,
    opset: int = 13,
    shape: Any = ("N", 4),
    **flags: Any,
) -> onnx.ModelProto:
    node = helper.make_node(operator, ["x", *constants], ["y"], name="the_node", domain=domain, **flags)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(value, dtype=F32), name) for name, value in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(domain, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def run(model: onnx.ModelProto, values: Array) -> Array:
    settings_ = library.load().SessionOptions()
    settings_.log_severity_level = 4
    session = library.opened(qonnx.expand_qonnx(model).SerializeToString(), settings_, where="g")
    made: Array = session.run(None, {"x": values})[0]
    return made


def rounded(values: Array, mode: str) -> Array:
    """The table of rounding modes in the specification of IntQuant."""
    whole, part = np.floor(np.abs(values)), np.abs(values) - np.floor(np.abs(values))
    up = {
        "UP": part > 0,
        "DOWN": part < 0,
        "HALF_UP": part >= 0.5,
        "HALF_DOWN": part > 0.5,
        "ROUND": (part > 0.5) | ((part == 0.5) & (whole % 2 == 1)),
        "CEIL": (part > 0) & (values > 0),
        "FLOOR": (part > 0) & (values < 0),
    }[mode.upper()]
    return (np.sign(values) * (whole + up)).astype(F32)


def bounds(bits: float, signed: bool, narrow: bool) -> tuple[F32, F32]:
    if signed:
        return F32(-(2 ** (bits - 1)) + narrow), F32(2 ** (bits - 1) - 1)
    return F32(0), F32(2**bits - 1 - narrow)


def int_quant(x: Array, scale: Any, zero: Any, bits: float, signed: bool, narrow: bool, mode: str) -> Array:
    y = x / F32(scale) + F32(zero)
    low, high = bounds(bits, signed, narrow)
    y = rounded(np.minimum(np.maximum(y, low), high), mode)
    return np.asarray((y - F32(zero)) * F32(scale), F32)


@settings(max_examples=60)
@given(
    values=VALUES,
    scale=st.floats(2.0**-7, 8, width=32),
    zero=st.sampled_from([0, 0, 3, 7]),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    narrow=st.booleans(),
    mode=st.sampled_from(MODES),
)
def test_quant_is_the_specification(
    values: Array, scale: float, zero: int, bits: int, signed: bool, narrow: bool, mode: str
) -> None:
    model = one_node(
        "Quant", {"s": scale, "z": zero, "b": bits}, signed=int(signed), narrow=int(narrow), rounding_mode=mode
    )
    wanted = int_quant(values, scale, zero, bits, signed, narrow, mode)
    np.testing.assert_array_equal(run(model, values), wanted)
    low, high = bounds(bits, signed, narrow)
    integers = run(model, values) / F32(scale) + F32(zero)
    assert (integers >= low - 0.01).all()
    assert (integers <= high + 0.01).all()


@pytest.mark.parametrize("mode", MODES)
def test_every_row_of_the_rounding_table(mode: str) -> None:
    numbers = np.array([[5.5, 2.5, 1.6, 1.1], [1.0, -1.0, -1.1, -1.6], [-2.5, -5.5, 0.5, -0.5]], dtype=F32)
    column = {
        "ROUND": [6, 2, 2, 1, 1, -1, -1, -2, -2, -6, 0, 0],
        "CEIL": [6, 3, 2, 2, 1, -1, -1, -1, -2, -5, 1, 0],
        "FLOOR": [5, 2, 1, 1, 1, -1, -2, -2, -3, -6, 0, -1],
        "UP": [6, 3, 2, 2, 1, -1, -2, -2, -3, -6, 1, -1],
        "DOWN": [5, 2, 1, 1, 1, -1, -1, -1, -2, -5, 0, 0],
        "HALF_UP": [6, 3, 2, 1, 1, -1, -1, -2, -3, -6, 1, -1],
        "HALF_DOWN": [5, 2, 2, 1, 1, -1, -1, -2, -2, -5, 0, 0],
    }[mode.upper()]
    model = one_node("Quant", {"s": 1, "z": 0, "b": 8}, signed=1, narrow=0, rounding_mode=mode)
    assert run(model, numbers).ravel().tolist() == column


def test_defaults_channels_and_one_bit() -> None:
    values = np.array([[-300.0, 0.0, 2.0, 300.0]], dtype=F32)
    # Signed, not narrow, ROUND is what the specification takes where nothing is said.
    assert run(one_node("IntQuant", {"s": 1, "z": 0, "b": 8}), values).tolist() == [[-128, 0, 2, 127]]
    per_channel = one_node("Quant", {"s": [[1, 2, 4, 8]], "z": 0, "b": 4}, signed=1, narrow=1)
    assert run(per_channel, values).tolist() == [[-7, 0, 4 * 0, 56]]
    assert run(one_node("Quant", {"s": 2, "z": 0, "b": 1}, signed=1), values).tolist() == [[-2, 2, 2, 2]]
    assert run(one_node("BipolarQuant", {"s": 0.5}), values).tolist() == [[-0.5, 0.5, 0.5, 0.5]]


@settings(max_examples=40)
@given(
    values=VALUES,
    scale=st.sampled_from([0.25, 0.3, 1.0]),
    zero=st.sampled_from([0, 4]),
    before=st.integers(6, 10),
    after=st.integers(2, 6),
    mode=st.sampled_from(["ROUND", "CEIL", "FLOOR"]),
)
def test_trunc_is_the_specification(values: Array, scale: float, zero: int, before: int, after: int, mode: str) -> None:
    whole = np.round(values / F32(scale) + F32(zero))
    first = one_node("Trunc", {"s": scale, "z": zero, "i": before, "o": after}, rounding_mode=mode)
    wanted = (rounded(whole / F32(2.0 ** (before - after)), mode) - F32(zero)) * F32(scale)
    np.testing.assert_array_equal(run(first, values), wanted)
    power = F32(2.0**2)
    out = F32(scale) * power
    second = one_node(
        "Trunc",
        {"s": scale, "z": zero, "i": before, "os": out, "oz": 0, "o": after},
        signed=1,
        narrow=0,
        rounding_mode=mode,
    )
    low, high = bounds(after, True, False)
    wanted = (rounded(np.clip(whole / power, low, high), mode) - F32(zero) / power) * out
    np.testing.assert_array_equal(run(second, values), wanted)


@pytest.mark.parametrize(
    ("shape", "axis", "layout"),
    [((3, 4), 1, "NCHW"), ((2, 4, 3, 5), 1, "NCHW"), ((2, 3, 5, 4), 3, "NHWC"), ((2, 3, 4), 2, "NCHW")],
)
@pytest.mark.parametrize("channels", [1, 4])
def test_thresholds_are_counted(shape: tuple[int, ...], axis: int, layout: str, channels: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(-10, 10, shape).astype(F32)
    table = np.sort(rng.integers(-10, 10, (channels, 7)), axis=1).astype(F32)
    model = one_node(
        "MultiThreshold", {"t": table}, shape=shape, out_scale=0.5, out_bias=-3.0, data_layout=layout, out_dtype="INT4"
    )
    moved = np.moveaxis(values, axis, -1)[..., None]
    wanted = np.moveaxis((moved >= table).sum(axis=-1), -1, axis) * F32(0.5) + F32(-3)
    np.testing.assert_array_equal(run(model, values), wanted)


def test_old_domains_and_opsets_are_brought_up(tmp_path: Path) -> None:
    model = one_node("Quant", {"s": 0.5, "z": 0, "b": 4}, domain="onnx.brevitas", opset=9, signed=1, narrow=1)
    del model.opset_import[1]
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    read = model_reader.read(path)
    assert qonnx.is_quantized(read)
    assert {opset.domain: opset.version for opset in read.opset_import} == {"": 9, qonnx.DOMAIN: 1}
    assert run(read, np.array([[0.3, -9, 9, 0.7]], dtype=F32)).tolist() == [[0.5, -3.5, 3.5, 0.5]]
    assert opsets.version(qonnx.expand_qonnx(read)) == 13
    assert not qonnx.is_quantized(qonnx.expand_qonnx(read))
    model_writer.save(read, tmp_path / "again.onnx")
    assert qonnx.is_quantized(model_reader.read(tmp_path / "again.onnx"))


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (lambda: one_node("Quant", {"s": 1, "z": 0, "b": 4}, rounding_mode="DITHER"), "rounding mode 'DITHER'"),
        (lambda: one_node("Quant", {"s": 1, "z": 0, "b": 0}), "bit width is 0"),
        (lambda: one_node("Trunc", {"s": 1, "z": 0, "o": 4}), "4 inputs are of no version"),
    ],
)
def test_what_cannot_be_replaced_is_named(node: Any, message: str) -> None:
    with pytest.raises(UnsupportedOperatorError, match=rf"node 'the_node'.*{message}"):
        qonnx.expand_qonnx(node())


def test_a_bit_width_that_is_computed_is_refused() -> None:
    model = one_node("Quant", {"s": 1, "z": 0, "b": 4})
    model.graph.node[0].input[3] = "x"
    with pytest.raises(UnsupportedOperatorError, match=r"node 'the_node'.*bit width is not constant"):
        qonnx.expand_qonnx(model)


def test_an_unknown_operator_of_qonnx_is_refused_on_reading(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(one_node("FloatQuant", {"s": 1}), path)
    with pytest.raises(UnsupportedOperatorError, match=r"node 'the_node'.*'FloatQuant'"):
        model_reader.read(path)


def test_nodes_in_the_standard_domain_are_known(tmp_path: Path) -> None:
    ours = {"scale": 0.5, "zero": 0.0, "bits": 4.0}
    published = one_node("Quant", ours, domain="", opset=13, signed=1, narrow=0, rounding_mode="ROUND")
    path = tmp_path / "published.onnx"
    path.write_bytes(published.SerializeToString())
    model = model_reader.load(path)
    assert {node.domain for node in model.graph.node} == {qonnx.DOMAIN}
    assert opsets.version(model) == 13
    values = np.array([[-9.0, -0.2, 0.3, 9.0]], F32)
    np.testing.assert_array_equal(run(model, values), [[-4.0, 0.0, 0.5, 3.5]])

"""ONNX to .tflite: what the file computes, how its axes and names belong to the model's, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support import lowering

from kedge_protocol.errors import LoweringError, TargetError, ToolchainError, UnsupportedOperatorError
from kedge_targets import target
from kedge_targets.backends.tflite import toolchain_client
from kedge_targets.backends.tflite.compiler import Compiler
from kedge_targets.contract import Lowered
from kedge_targets.graph import library
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]

pytestmark = pytest.mark.usefixtures("tflite_toolchain")


class Samples:
    """Samples of any number of inputs."""

    def __init__(self, samples: list[dict[str, Array]]) -> None:
        self._samples = samples

    @property
    def samples(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return iter(self._samples)


def weights(seed: int) -> Callable[..., onnx.TensorProto]:
    source = np.random.default_rng(seed)

    def make(name: str, *shape: int) -> onnx.TensorProto:
        scale = 1 / math.sqrt(shape[0])
        return numpy_helper.from_array((source.standard_normal(shape) * scale).astype(np.float32), name)

    return make


def constant(name: str, values: list[int] | float) -> onnx.TensorProto:
    kind = np.float32 if isinstance(values, float) else np.int64
    return numpy_helper.from_array(np.array(values, dtype=kind), name)


def model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    initializers: list[onnx.TensorProto],
    kinds: dict[str, int] | None = None,
    *,
    opset: int = 17,
) -> onnx.ModelProto:
    def info(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, (kinds or {}).get(name, TensorProto.FLOAT), shape)

    graph = helper.make_graph(
        nodes,
        "test",
        [info(*item) for item in inputs.items()],
        [info(*item) for item in outputs.items()],
        initializers,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(made)
    return made


def transformer(length: int, width: int, heads: int) -> onnx.ModelProto:
    """One block: attention, then two layers with GELU as exporters write it (Erf), each normalized and added. Input
    ``sequence`` N x length x width, outputs ``score`` N x 3 and ``hidden`` like the input."""
    w = weights(5)
    depth = width // heads
    node = helper.make_node
    nodes = [
        node("LayerNormalization", ["sequence", "g1", "n1"], ["s"], name="norm1"),
    ]
    for part, axes in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        nodes += [
            node("MatMul", ["s", f"w{part}"], [f"{part}0"], name=f"project_{part}"),
            node("Reshape", [f"{part}0", "split"], [f"{part}1"], name=f"split_{part}"),
            node("Transpose", [f"{part}1"], [part], name=f"turn_{part}", perm=axes),
        ]
    nodes += [
        node("MatMul", ["q", "k"], ["a0"], name="attend"),
        node("Div", ["a0", "root"], ["a1"], name="scale"),
        node("Softmax", ["a1"], ["a2"], name="softmax", axis=-1),
        node("MatMul", ["a2", "v"], ["a3"], name="gather"),
        node("Transpose", ["a3"], ["a4"], name="turn_back", perm=[0, 2, 1, 3]),
        node("Reshape", ["a4", "join"], ["a5"], name="join_heads"),
        node("MatMul", ["a5", "wo"], ["a6"], name="project_o"),
        node("Add", ["sequence", "a6"], ["b0"], name="add1"),
        node("LayerNormalization", ["b0", "g1", "n1"], ["b1"], name="norm2"),
        node("MatMul", ["b1", "wf"], ["b2"], name="wide"),
        node("Div", ["b2", "root2"], ["b3"], name="gelu_div"),
        node("Erf", ["b3"], ["b4"], name="gelu_erf"),
        node("Add", ["b4", "one"], ["b5"], name="gelu_add"),
        node("Mul", ["b2", "b5"], ["b6"], name="gelu_mul"),
        node("Mul", ["b6", "half"], ["b7"], name="gelu_half"),
        node("MatMul", ["b7", "wn"], ["b8"], name="narrow"),
        node("Add", ["b0", "b8"], ["hidden"], name="add2"),
        node("ReduceMean", ["hidden"], ["mean"], name="mean", axes=[1], keepdims=0),
        node("Gemm", ["mean", "wc", "bc"], ["score"], name="classify"),
    ]
    return model(
        nodes,
        {"sequence": ["N", length, width]},
        {"score": ["N", 3], "hidden": ["N", length, width]},
        [
            *(w(f"w{part}", width, width) for part in "qkvo"), w("wf", width, 2 * width), w("wn", 2 * width, width),
            w("wc", width, 3), w("bc", 3),
            numpy_helper.from_array(np.ones(width, np.float32), "g1"),
            numpy_helper.from_array(np.zeros(width, np.float32), "n1"),
            constant("split", [0, length, heads, depth]), constant("join", [0, length, width]),
            constant("root", math.sqrt(depth)), constant("root2", math.sqrt(2.0)),
            constant("one", 1.0), constant("half", 0.5),
        ],
    )  # fmt: skip


def lower(
    graph: onnx.ModelProto | Path, precision: Precision, samples: list[dict[str, Array]], workdir: Path
) -> Lowered:
    workdir.mkdir()
    if isinstance(graph, onnx.ModelProto):
        path = workdir.parent / f"{workdir.name}.onnx"
        path.write_bytes(graph.SerializeToString())
        graph = path
    device = target.find("rpi4")
    return Compiler().lower(
        graph, Plan(default=precision), Samples(samples), target=device, options={"threads": 2}, workdir=workdir
    )


def noise(shapes: dict[str, tuple[int, ...]], count: int, seed: int = 0) -> list[dict[str, Array]]:
    source = np.random.default_rng(seed)
    return [
        {name: source.standard_normal((1, *shape)).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]


def errors(
    graph: onnx.ModelProto, lowered: Lowered, samples: list[dict[str, Array]], kernel_set: str | None = None
) -> dict[str, float]:
    """Root mean square error of each output over all samples, relative to the float model's answers."""
    session = library.load().InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    executor = lowering.executor("rpi4", lowered, kernel_set)
    try:
        return {
            output.name: math.sqrt(
                sum(float(np.sum((executor(sample)[output.name] - session.run([output.name], sample)[0]) ** 2))
                    for sample in samples)
                / sum(float(np.sum(session.run([output.name], sample)[0] ** 2)) for sample in samples)
            )
            for output in session.get_outputs()
        }  # fmt: skip
    finally:
        executor.close()


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("case", "drop", "agreement", "ratio"),
    [(lowering.ic, 0.015, 0.93, 0.32), (lowering.kws, 0.005, 0.93, 0.52)],
    ids=["ic", "kws"],
)
def test_int8_holds_its_accuracy_and_size_with_both_kernel_sets(
    case: Callable[[Path], lowering.Case],
    drop: float,
    agreement: float,
    ratio: float,
    shared_data: Path,
    tmp_path: Path,
) -> None:
    given = case(shared_data)
    calibration = lowering.Calibration("input", given.calibration)
    lowered = lowering.lower("rpi4", given.model, Precision.INT8, calibration, tmp_path / "work")
    assert lowered.calibration_samples == len(given.calibration)
    assert lowering.size(lowered) <= ratio * given.model.stat().st_size
    (spec,) = lowered.inputs
    assert (spec.file.dtype, lowered.outputs[0].file.dtype) == ("int8", "int8")
    assert spec.file.scale is not None
    assert spec.layout == "NHWC"
    reference = lowering.float_answers(given.model, given.evaluation)
    for kernel_set in ("xnnpack", "builtin"):
        answers = lowering.executor("rpi4", lowered, kernel_set)({"input": given.evaluation})["output"]
        assert lowering.top1(reference, given.labels) - lowering.top1(answers, given.labels) <= drop
        assert lowering.top1(answers, reference.argmax(axis=1)) >= agreement


@pytest.mark.parametrize("kernel_set", ["xnnpack", "builtin"])
def test_a_network_with_channels_first_becomes_one_with_channels_last(tmp_path: Path, kernel_set: str) -> None:
    graph = lowering.classifier()
    samples = noise({"image": (3, 8, 8)}, 40)
    exact = lower(graph, Precision.FLOAT32, samples, tmp_path / "float")
    assert errors(graph, exact, samples[:5], kernel_set)["score"] < 1e-5
    (spec,) = exact.inputs
    assert (spec.shape, spec.layout) == ((None, 3, 8, 8), "NCHW")
    assert (spec.file.shape, spec.file.permutation, spec.file.scale) == ((1, 8, 8, 3), (0, 2, 3, 1), None)
    quantized = lower(graph, Precision.INT8, samples, tmp_path / "int8")
    assert quantized.inputs[0].file.permutation == (0, 2, 3, 1)
    assert 1e-6 < errors(graph, quantized, samples[:5], kernel_set)["score"] < 0.05


def test_a_picture_as_deep_as_it_is_wide_keeps_its_axes_apart(tmp_path: Path) -> None:
    w = weights(3)
    graph = model(
        [
            helper.make_node("Conv", ["image", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["c"], ["map"], name="relu"),
        ],
        {"image": ["N", 6, 6, 6]},
        {"map": ["N", 6, 6, 6]},
        [w("w", 6, 6, 3, 3)],
    )
    samples = noise({"image": (6, 6, 6)}, 20)
    lowered = lower(graph, Precision.FLOAT32, samples, tmp_path / "work")
    assert errors(graph, lowered, samples)["map"] < 1e-5
    assert lowered.inputs[0].file.permutation == (0, 2, 3, 1)
    assert lowered.outputs[0].file.permutation == (0, 2, 3, 1)


@pytest.mark.parametrize(("length", "width", "heads"), [(10, 32, 4), (16, 64, 4)])
def test_a_transformers_sequence_is_not_turned(tmp_path: Path, length: int, width: int, heads: int) -> None:
    graph = transformer(length, width, heads)
    samples = noise({"sequence": (length, width)}, 40)
    exact = lower(graph, Precision.FLOAT32, samples, tmp_path / "float")
    assert max(errors(graph, exact, samples[:5]).values()) < 1e-4
    assert exact.inputs[0].file.shape == (1, length, width)
    assert exact.inputs[0].file.permutation is None
    quantized = lower(graph, Precision.INT8, samples, tmp_path / "int8")
    for kernel_set in ("xnnpack", "builtin"):
        assert errors(graph, quantized, samples[:5], kernel_set)["hidden"] < 0.1


def test_a_model_whose_axes_onnx2tf_confuses_is_converted_without_it(tmp_path: Path) -> None:
    """Eight steps, eight heads, eight values a head: no size tells an axis from another, and onnx2tf mistakes them."""
    graph = transformer(8, 64, 8)
    samples = noise({"sequence": (8, 64)}, 8)
    lowered = lower(graph, Precision.INT8, samples, tmp_path / "work")
    assert errors(graph, lowered, samples[:5])["hidden"] < 0.1


def test_inputs_and_outputs_keep_their_names_whatever_their_order_in_the_file(tmp_path: Path) -> None:
    w = weights(7)
    node = helper.make_node
    graph = model(
        [
            node("Conv", ["picture", "w"], ["c"], name="conv", pads=[1, 1, 1, 1]),
            node("ReduceMean", ["c"], ["m"], name="mean", axes=[2, 3], keepdims=0),
            node("Tanh", ["m"], ["first"], name="tanh"),
            node("MatMul", ["table", "wt"], ["second"], name="times"),
            node("Sigmoid", ["table"], ["third"], name="sigmoid"),
            node("Gather", ["rows", "index"], ["picked"], name="pick", axis=0),
            node("ReduceMean", ["picked"], ["fourth"], name="mean2", axes=[1], keepdims=0),
        ],
        {"picture": ["N", 4, 4, 4], "table": ["N", 5, 5], "index": ["N", 3]},
        {"first": ["N", 5], "second": ["N", 5, 5], "third": ["N", 5, 5], "fourth": ["N", 5]},
        [w("w", 5, 4, 3, 3), w("wt", 5, 5), w("rows", 20, 5)],
        {"index": TensorProto.INT64},
    )
    source = np.random.default_rng(0)
    samples = [
        {**sample, "index": source.integers(0, 20, (1, 3))}
        for sample in noise({"picture": (4, 4, 4), "table": (5, 5)}, 30)
    ]
    exact = lower(graph, Precision.FLOAT32, samples, tmp_path / "float")
    assert [spec.name for spec in exact.inputs] == ["picture", "table", "index"]
    assert [spec.name for spec in exact.outputs] == ["first", "second", "third", "fourth"]
    assert max(errors(graph, exact, samples[:5]).values()) < 1e-5
    quantized = lower(graph, Precision.INT8, samples, tmp_path / "int8")
    assert max(errors(graph, quantized, samples[:5]).values()) < 0.1
    assert quantized.inputs[2].file.scale is None


def test_a_fixed_batch_stays(tmp_path: Path) -> None:
    graph = lowering.classifier(batch=2)
    samples = noise({"image": (3, 8, 8)}, 21)
    lowered = lower(graph, Precision.INT8, samples, tmp_path / "work")
    assert lowered.calibration_samples == 22  # the last group is filled up
    assert lowered.inputs[0].shape == (2, 3, 8, 8)
    assert lowered.inputs[0].file.shape == (2, 8, 8, 3)
    pairs = [{"image": np.concatenate([samples[0]["image"], samples[1]["image"]])}]
    assert errors(graph, lowered, pairs)["score"] < 0.05


def test_float16_halves_the_weights(tmp_path: Path) -> None:
    graph = transformer(10, 32, 4)
    samples = noise({"sequence": (10, 32)}, 2)
    sizes = {
        precision: lowering.size(lower(graph, precision, samples, tmp_path / precision.value))
        for precision in (Precision.FLOAT32, Precision.FLOAT16)
    }
    assert sizes[Precision.FLOAT16] < 0.75 * sizes[Precision.FLOAT32]


def test_equal_input_gives_equal_bytes_from_a_kept_and_from_a_new_driver(tmp_path: Path) -> None:
    graph, other = lowering.classifier(), lowering.classifier(seed=9)
    samples = noise({"image": (3, 8, 8)}, 20)
    found = []
    for number in range(3):
        if number == 2:
            for worker, _ in toolchain_client._client._kept.values():
                worker.close()
            toolchain_client._client._kept.clear()
        files = [lower(graph, p, samples, tmp_path / f"{p.value}-{number}") for p in lowering.precisions("rpi4")]
        found.append([lowering.content(lowered) for lowered in files])
        lower(other, Precision.FLOAT32, samples, tmp_path / f"other-{number}")
    assert found[0] == found[1] == found[2]


def test_the_given_graph_is_not_changed_and_calibration_leaves_no_files(tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    path.write_bytes(lowering.classifier().SerializeToString())
    before = path.read_bytes()
    lower(path, Precision.INT8, noise({"image": (3, 8, 8)}, 4), tmp_path / "work")
    assert path.read_bytes() == before
    assert not list((tmp_path / "work").glob("*.npy"))


def test_an_unsupported_operator_is_named_with_its_node(tmp_path: Path) -> None:
    graph = model(
        [
            helper.make_node("Relu", ["signal"], ["r"], name="fine"),
            helper.make_node("DFT", ["r"], ["spectrum"], name="fourier", axis=1),
        ],
        {"signal": ["N", 8, 1]},
        {"spectrum": ["N", 8, 2]},
        [],
    )
    with pytest.raises(UnsupportedOperatorError, match="DFT") as caught:
        lower(graph, Precision.FLOAT32, noise({"signal": (8, 1)}, 2), tmp_path / "work")
    assert caught.value.where == "node 'fourier'"


@pytest.mark.parametrize("operator", ["ReduceL1", "ReduceL2"])
@pytest.mark.parametrize("opset", [17, 20])
def test_norms_are_computed_by_their_definition(tmp_path: Path, operator: str, opset: int) -> None:
    of_input = opset > 17
    how: dict[str, Any] = {} if of_input else {"axes": [1]}
    graph = model(
        [
            helper.make_node("Relu", ["signal"], ["r"], name="relu"),
            helper.make_node(operator, ["r", *(["axes"] if of_input else [])], ["n"], name="norm", keepdims=1, **how),
            helper.make_node("Div", ["r", "n"], ["out"], name="scaled"),
        ],
        {"signal": ["N", 8]},
        {"out": ["N", 8]},
        [numpy_helper.from_array(np.array([1], np.int64), "axes")] if of_input else [],
        opset=opset,
    )
    samples = noise({"signal": (8,)}, 10)
    lowered = lower(graph, Precision.FLOAT32, samples, tmp_path / "work")
    assert errors(graph, lowered, samples)["out"] < 1e-5


@pytest.mark.parametrize("kernel_set", ["xnnpack", "builtin"])
def test_int8_with_ranges_of_each_call_needs_no_samples(tmp_path: Path, kernel_set: str) -> None:
    graph = transformer(16, 64, 4)
    samples = noise({"sequence": (16, 64)}, 20)
    exact = lower(graph, Precision.FLOAT32, samples, tmp_path / "float")
    lowered = lower(graph, Precision.INT8_DYNAMIC, [], tmp_path / "dynamic")
    assert lowered.calibration_samples == 0
    assert {spec.file.dtype for spec in (*lowered.inputs, *lowered.outputs)} == {"float32"}
    assert lowering.size(lowered) < 0.5 * lowering.size(exact)
    found = errors(graph, lowered, samples, kernel_set)
    assert 1e-5 < max(found.values()) < 0.05


def test_a_free_axis_beside_the_batch_gets_the_size_that_the_samples_have(tmp_path: Path) -> None:
    graph = model(
        [helper.make_node("Relu", ["text"], ["out"], name="relu")], {"text": ["N", "T"]}, {"out": ["N", "T"]}, []
    )
    samples = noise({"text": (4,)}, 3)
    lowered = lower(graph, Precision.FLOAT32, samples, tmp_path / "work")
    assert (lowered.inputs[0].shape, lowered.outputs[0].shape) == ((None, 4), (None, 4))
    assert lowered.notes == ("fixed as the calibration samples have it: axis 1 of text to 4",)
    assert errors(graph, lowered, samples)["out"] == 0


@pytest.mark.parametrize(
    ("samples", "axis", "told", "where"),
    [
        ([], "T", "there are no samples", "input 'text'"),
        ([*noise({"text": (4,)}, 2), *noise({"text": (7,)}, 1)], "U", "depends on the length", "output 'out'"),
    ],
    ids=["none", "of two lengths, and an output of its own"],
)
def test_a_free_axis_that_nothing_settles_is_refused_by_name(
    tmp_path: Path, samples: list[dict[str, Array]], axis: str, told: str, where: str
) -> None:
    graph = model(
        [helper.make_node("Relu", ["text"], ["out"], name="relu")], {"text": ["N", "T"]}, {"out": ["N", axis]}, []
    )
    with pytest.raises(LoweringError, match=told) as caught:
        lower(graph, Precision.FLOAT32, samples, tmp_path / "work")
    assert caught.value.where == where


def test_int8_without_samples_and_an_unknown_option_are_refused(tmp_path: Path) -> None:
    graph = lowering.classifier()
    with pytest.raises(LoweringError, match="no calibration samples"):
        lower(graph, Precision.INT8, [], tmp_path / "none")
    assert lower(graph, Precision.FLOAT32, [], tmp_path / "float").files
    with pytest.raises(TargetError, match="'speed'"):
        Compiler().lower(
            tmp_path / "graph.onnx",
            Plan(default=Precision.FLOAT32),
            Samples([]),
            target=target.find("rpi4"),
            options={"speed": 11},
            workdir=tmp_path,
        )


def test_a_missing_toolchain_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Compiler().missing() is None
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "nothing"))
    assert "kedge toolchain install tflite" in (Compiler().missing() or "")
    with pytest.raises(ToolchainError, match="kedge toolchain install tflite"):
        lower(lowering.classifier(), Precision.FLOAT32, [], tmp_path / "work")

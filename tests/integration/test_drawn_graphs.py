"""int8 without a search of random small graphs of the operators in use: what is lowered answers, and little is refused.

The seed is KEDGE_DRAWN_SEED, the number of graphs of the long proof KEDGE_DRAWN_GRAPHS."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.support import drawn
from tests.support.drawn.campaign import campaign

SEED = int(os.environ.get("KEDGE_DRAWN_SEED", "0"))
GRAPHS = int(os.environ.get("KEDGE_DRAWN_GRAPHS", "2000"))
OF_ZOO = frozenset({
    "Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Constant", "Conv", "ConvTranspose", "Div",
    "Einsum", "Erf", "Expand", "Flatten", "GRU", "Gather", "Gemm", "GlobalAveragePool", "HardSigmoid", "HardSwish",
    "LSTM", "LayerNormalization", "LeakyRelu", "MatMul", "MaxPool", "Mul", "PRelu", "Pad", "Pow", "ReduceMax",
    "ReduceMean", "ReduceSum", "Relu", "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Tanh", "Transpose", "Unsqueeze", "Where",
})  # fmt: skip
"""Of nudenet's YOLOv8n, magika, rapidocr and MiniLM."""
_MENDED = {
    # What decides between branches; a branch that reads integers behind a pooling; a Softmax over one element; one
    # whose answers differ little; a gate
    # whose product nothing reads; ranges whose two largest values lie close together; an average beyond the border.
    "generic-cpu": (60213, 60547, 60624, 61511, 60705, 80323, 90084),
    # A norm that is written out before a batch; attention that one sample in four suffers; a product whose first factor
    # is constant; a GRU that does not keep its name; values that calibration did not see; a divisor near 0; reshapes
    # that a scale is moved across; a bias that is a row; a norm that is written out, over an axis of three; a norm
    # whose parts have names of their own; a SiLU of -20, which ONNX Runtime does not know; a constant that both
    # branches read; an output that is always 0; a product with a tail, by channels; an activation behind a pooling.
    "intel-cpu": (
        18,
        89,
        50144,
        50292,
        60035,
        60259,
        60019,
        82047,
        100087,
        310092,
        342,
        411,
        1134,
        311025,
        311036,
        912,
    ),
}
"""Seeds whose faults are mended."""
_FEW_BITS = frozenset({"Quant", "BipolarQuant"})


@pytest.mark.parametrize(("target", "count"), [("generic-cpu", 24), ("intel-cpu", 8)])
def test_every_output_holds_or_its_layers_stay_in_float(target: str, count: int) -> None:
    found = campaign(target, [*range(SEED, SEED + count), *_MENDED[target]])
    assert not [*found.noisy, *found.weak, *found.broken], found.text()
    assert len(found.refused) <= 1, found.text()


def test_weights_behind_a_dequantization_are_integers() -> None:
    found = campaign("generic-cpu", (60858, 60867, 60962, 61002))
    assert found.shares == [1.0] * 4
    assert not [*found.noisy, *found.weak], found.text()


@pytest.mark.usefixtures("tflite_toolchain")
def test_what_onnx2tf_cannot_convert_or_mistakes_is_converted_without_it() -> None:
    # SAME_LOWER; a dilated convolution with strides; axes of one size; a reversed LSTM; axes out of order; a grouped
    # convolution of a row; a GELU of its parts; names with spaces within an If; a mask of attention below scores of
    # some hundreds; a channel that is always 0; an output of 1e-6 that is computed of numbers near 20; branches that
    # add a row to axes of one size; attention to one position, which gives what it reads, before a decision; a
    # comparison with a number that a rounding reaches; a Concat and a Min that want unlike scales for one tensor; an
    # LSTM behind a GELU; a division that the converter makes, by what is 0 as an integer.
    seeds = (6, 9, 13, 23, 32, 34, 114, 50223, 50248, 50368, 50412, 110030, 410055, 410316, 410089, 410220, 1958)
    found = campaign("rpi4", [*(SEED + one for one in range(3)), *seeds])
    assert not [*found.noisy, *found.broken, *found.refused], found.text()
    assert {one.seed for one in found.weak} <= {50412}, found.text()  # 1e-6 beside 20: no float32 has more


@pytest.mark.usefixtures("tflite_toolchain")
def test_few_operators_stay_in_float_for_an_output() -> None:
    # All of them stayed in float: a last partial window of a MaxPool, by either converter; a norm whose one layer is
    # what matters; attention whose scores are; the exponential of a Softplus, beside which all else was nothing.
    found = campaign("rpi4", (100011, 100103, 100177, 100122, 400032))
    assert not [*found.noisy, *found.broken, *found.refused], found.text()
    assert min(found.shares) > 0.75, found.shares


@pytest.mark.campaign
@pytest.mark.parametrize("target", ["generic-cpu", "intel-cpu", "rpi4"])
def test_thousands_of_graphs(target: str) -> None:
    found = campaign(target, range(SEED, SEED + GRAPHS), apart=True)
    print(found.text())
    assert found.ran >= 0.9 * GRAPHS
    assert not [*found.noisy, *found.broken], found.text()
    assert found.refused_share <= 0.03, found.text()
    median, tenth = np.percentile(found.shares, [50, 10])
    assert median >= 0.8, found.text()
    assert tenth >= 0.5, found.text()


@pytest.mark.shared_data
def test_the_operators_of_real_models_are_drawn_with_their_attributes(shared_data: Path) -> None:
    # The rarest operator is in one graph of 220: of one seed in a hundred a thousand graphs lack it.
    graphs = [drawn.graph(seed) for seed in range(SEED, SEED + 1000)]
    while not (covered := drawn.coverage(graphs)).keys() >= OF_ZOO and len(graphs) < 4000:
        graphs += [drawn.graph(seed) for seed in range(SEED + len(graphs), SEED + len(graphs) + 1000)]
    print({name: sorted(attributes) for name, attributes in sorted(covered.items())})
    assert covered.keys() >= OF_ZOO
    for path in sorted((shared_data / "models").glob("*.onnx")):
        for node in onnx.load(path).graph.node:
            if node.op_type not in _FEW_BITS and node.op_type != "Unsqueeze":
                missing = {attribute.name for attribute in node.attribute} - covered[node.op_type]
                assert not missing, f"{path.name}: {node.op_type} {missing}"

"""Small graphs of forms that exporters write and quantizers trip over, each with samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[Any]
Node = onnx.NodeProto

_SAME = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
_IMAGE, _ROW = ("N", 3, 8, 8), ("N", 8)


@dataclass(frozen=True)
class Odd:
    """A model of one input and the shape of a sample (the batch first)."""

    model: onnx.ModelProto
    shape: tuple[int | str, ...]

    @property
    def input(self) -> str:
        """Its name."""
        return str(self.model.graph.input[0].name)

    def samples(self, count: int, seed: int = 0) -> Array:
        """Normally distributed, float32."""
        shape = tuple(int(size) for size in self.shape[1:])
        return np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)


class Samples:
    """As a calibration."""

    def __init__(self, odd: Odd, count: int) -> None:
        self._odd = odd
        self.samples = count

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for sample in self._odd.samples(self.samples, seed=1):
            yield {self._odd.input: sample[None]}


def random(*shape: int, scale: float = 1.0) -> Array:
    """Weights whose products keep the size of what they multiply."""
    rng = np.random.default_rng(sum(shape))
    return (rng.standard_normal(shape) * scale / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


def node(operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Node:
    """A node that is named after its first output."""
    return helper.make_node(operator, inputs, outputs, name=f"{operator}_{outputs[0]}", **attributes)


def odd(
    nodes: list[Node],
    outputs: dict[str, tuple[int | str, ...]],
    weights: dict[str, Any],
    *,
    shape: tuple[int | str, ...] = _IMAGE,
    name: str = "x",
    opsets: tuple[tuple[str, int], ...] = (("", 17),),
    functions: tuple[onnx.FunctionProto, ...] = (),
) -> Odd:
    """A model of these nodes; outputs by name."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "odd",
        [value(name, TensorProto.FLOAT, shape)],
        [value(one, TensorProto.FLOAT, size) for one, size in outputs.items()],
        [numpy_helper.from_array(np.asarray(array, order="C"), one) for one, array in weights.items()],
    )
    imports = [helper.make_opsetid(*one) for one in opsets]
    made = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)
    return Odd(made, shape)


def gemm(bias: Any, **attributes: float) -> Odd:
    """One product, its bias and factors as given."""
    return odd(
        [node("Gemm", ["x", "g", "b"], ["y"], **attributes)], {"y": _ROW}, {"g": random(8, 8), "b": bias}, shape=_ROW
    )


def tied_matrix() -> Odd:
    """One matrix, its output channels along either axis, and a table of embeddings' worth of reading beside."""
    return odd(
        [
            node("Gemm", ["x", "g"], ["h"], transB=1),
            node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "g"], ["y"]),
            node("Transpose", ["g"], ["t"], perm=[1, 0]),
            node("MatMul", ["r", "t"], ["z"]),
        ],
        {"y": _ROW, "z": _ROW},
        {"g": random(8, 8)},
        shape=_ROW,
    )


def clipped(low: float, high: float) -> Odd:
    """Bounds that may exclude 0."""
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Clip", ["a", "low", "high"], ["u"]),
            node("Conv", ["u", "w2"], ["y"], **_SAME),
        ],
        {"y": ("N", 4, 8, 8)},
        {
            "w": random(4, 3, 3, 3, scale=3),
            "w2": random(4, 4, 3, 3),
            "low": np.float32(low),
            "high": np.float32(high),
        },
    )


def answers_on_the_way() -> Odd:
    """Outputs that others read on: the input itself, before a Relu, behind it, a part of a Split."""
    maps = ("N", 4, 8, 8)
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            node("Split", ["r"], ["s", "t"], axis=1),
            node("Conv", ["s", "w2"], ["y"], **_SAME),
        ],
        {"y": maps, "a": maps, "r": maps, "t": ("N", 2, 8, 8), "x": _IMAGE},
        {"w": random(4, 3, 3, 3, scale=3), "w2": random(4, 2, 3, 3)},
    )


def stacked_matrices() -> Odd:
    """A product with a stack of matrices."""
    shape = ("N", 3, 4, 8)
    return odd([node("MatMul", ["x", "w"], ["y"])], {"y": ("N", 3, 4, 6)}, {"w": random(3, 8, 6)}, shape=shape)


def clashing_names() -> Odd:
    """One bias for three layers, and tensors with names that quantizers give."""
    names = ["x_scale", "b_rounded", "b_quantized", "w_integers", "x_scale_rounded", "y"]
    nodes = []
    for index in (0, 2, 4):
        nodes.append(node("Conv", [names[index], "w", "b"], [names[index + 1]], **_SAME))
        if index < 4:
            nodes.append(node("Sigmoid", [names[index + 1]], [names[index + 2]]))
    shape = ("N", 4, 8, 8)
    return odd(nodes, {"y": shape}, {"w": random(4, 4, 3, 3), "b": random(4)}, shape=shape, name="x_scale")


def branches() -> Odd:
    """An If whose branches read an activation and weights from outside."""
    shape = (1, 4, 8, 8)

    def branch(weight: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"o{weight}", TensorProto.FLOAT, shape)
        return helper.make_graph([node("Conv", ["r", weight], [f"o{weight}"], **_SAME)], weight, [], [output])

    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            node("ReduceMean", ["x"], ["mu"], keepdims=0),
            node("Greater", ["mu", "zero"], ["c"]),
            node("If", ["c"], ["y"], then_branch=branch("wt"), else_branch=branch("we")),
        ],
        {"y": shape},
        {"w": random(4, 3, 3, 3), "wt": random(4, 4, 3, 3), "we": -random(4, 4, 3, 3), "zero": np.float32(0)},
        shape=(1, 3, 8, 8),
    )


def branches_within_branches() -> Odd:
    """An If within a branch, which is decided by what the branch computes of an activation from outside: near 0."""
    shape = (1, 4, 8, 8)

    def branch(name: str, nodes: list[Node]) -> onnx.GraphProto:
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)])

    inner = [
        node("Conv", ["a", "we"], ["b"], **_SAME),
        node("ReduceMean", ["b"], ["mean"], keepdims=0),
        node("Greater", ["mean", "zero"], ["turned"]),
        node(
            "If", ["turned"], ["else"],
            then_branch=branch("minus", [node("Neg", ["b"], ["minus"])]),
            else_branch=branch("plus", [node("Identity", ["b"], ["plus"])]),
        ),
    ]  # fmt: skip
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("ReduceMax", ["x"], ["most"], keepdims=0),
            node("Greater", ["most", "many"], ["c"]),
            node(
                "If", ["c"], ["y"],
                then_branch=branch("then", [node("Conv", ["a", "wt"], ["then"], **_SAME)]),
                else_branch=branch("else", inner),
            ),
        ],
        {"y": shape, "a": shape},
        {
            "w": random(4, 3, 3, 3), "wt": random(4, 4, 3, 3), "we": -random(4, 4, 3, 3), "zero": np.float32(0),
            "many": np.float32(3.0),
        },
        shape=(1, 3, 8, 8),
    )  # fmt: skip


def softmax_over_axes(operator: str = "Softmax") -> Odd:
    """Before opset 13 a Softmax runs over all axes from the given one on."""
    nodes = [
        node("Gemm", ["x", "g"], ["h"]),
        node("Reshape", ["h", "two"], ["r"]),
        node(operator, ["r"], ["y"], axis=1),
    ]
    weights = {"g": random(8, 8), "two": np.array([-1, 2, 4])}
    return odd(nodes, {"y": ("N", 2, 4)}, weights, shape=_ROW, opsets=(("", 12),))


def gathered_by_places() -> Odd:
    """Rows and columns of each sample's picture, the second counted from the end."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], **_SAME),
        node("GatherND", ["a", "places"], ["g"], batch_dims=1),
        node("MatMul", ["g", "m"], ["y"]),
    ]
    weights = {"w": random(8, 3, 3, 3), "places": np.array([[2, -3]]), "m": random(8, 5)}
    return odd(nodes, {"y": (1, 5)}, weights, shape=(1, 3, 8, 8))


def token_joined() -> Odd:
    """One row of each sample, as the token of a class, joined with what is computed of it."""
    nodes = [
        node("MatMul", ["x", "m"], ["h"]),
        node("Gather", ["h", "first"], ["t"], axis=1),
        node("Gemm", ["t", "g", "b"], ["q"]),
        node("Concat", ["q", "t"], ["y"], axis=1),
    ]
    weights = {"m": random(8, 8), "first": np.int64(0), "g": random(8, 8), "b": random(8)}
    return odd(nodes, {"y": ("N", 16)}, weights, shape=("N", 4, 8))


def loop() -> Odd:
    """A Loop that adds an activation of the graph around it, three times."""
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Add", ["so_far", "r"], ["sum"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("so_far", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, None),
        ],
    )
    shape = ("N", 4, 8, 8)
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            node("Loop", ["times", "true", "r"], ["z"], body=body),
            node("Conv", ["z", "w2"], ["y"], **_SAME),
        ],
        {"y": shape},
        {"w": random(4, 3, 3, 3), "w2": random(4, 4, 3, 3), "times": np.int64(3), "true": np.bool_(True)},
    )


def loop_from_outside() -> Odd:
    """A Loop that begins with the tensor which its body also reads from outside, and runs a given number of times."""
    value, shape = helper.make_tensor_value_info, ("N", 4, 8, 8)
    body = helper.make_graph(
        [
            node("Conv", ["h", "w2"], ["c"], **_SAME),
            node("Tanh", ["c"], ["t"]),
            node("Add", ["t", "a"], ["sum"]),
            node("Identity", ["on"], ["go"]),
        ],
        "body",
        [value("turn", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("h", TensorProto.FLOAT, shape)],
        [value("go", TensorProto.BOOL, []), value("sum", TensorProto.FLOAT, shape)],
    )
    nodes = [
        node("Conv", ["x", "w"], ["a"], **_SAME),
        node("Loop", ["times", "", "a"], ["z"], body=body),
        node("Conv", ["z", "w2"], ["y"], **_SAME),
    ]
    weights = {"w": random(4, 3, 3, 3), "w2": random(4, 4, 3, 3), "times": np.int64(3)}
    return odd(nodes, {"y": shape}, weights)


def turned_by_lengths() -> Odd:
    """Rows in the reverse order, as the second direction of a recurrent layer that is written out takes them."""
    nodes = [
        node("MatMul", ["x", "m"], ["a"]),
        node("ReverseSequence", ["a", "lengths"], ["r"], batch_axis=0, time_axis=1),
        node("Concat", ["a", "r"], ["c"], axis=-1),
        node("MatMul", ["c", "n"], ["y"]),
    ]
    weights = {"m": random(5, 7), "lengths": np.array([4]), "n": random(14, 4)}
    return odd(nodes, {"y": (1, 6, 4)}, weights, shape=(1, 6, 5))


def own_function() -> Odd:
    """``x sigmoid(x)`` as a function of the model's own, behind a convolution without bias."""
    swish = helper.make_function(
        "own",
        "Swish",
        ["X"],
        ["Y"],
        [node("Sigmoid", ["X"], ["S"]), node("Mul", ["X", "S"], ["Y"])],
        [helper.make_opsetid("", 17)],
    )
    call = helper.make_node("Swish", ["a"], ["s"], domain="own", name="call")
    return odd(
        [node("Conv", ["x", "w"], ["a"], **_SAME), call, node("Conv", ["s", "w2"], ["y"], **_SAME)],
        {"y": ("N", 4, 8, 8)},
        {"w": random(4, 3, 3, 3, scale=3), "w2": random(4, 4, 3, 3)},
        opsets=(("", 17), ("own", 1)),
        functions=(swish,),
    )


def stored_small(kind: str) -> Odd:
    """Weights that lie in the file as float16 behind a Cast, or as int8 behind Cast and Mul or DequantizeLinear."""
    weight = random(16, 16, 3, 3)
    codes, step = np.round(weight / np.abs(weight).max() * 127).astype(np.int8), np.float32(np.abs(weight).max() / 127)
    behind, stored = {
        "float16": ([node("Cast", ["q"], ["w2"], to=TensorProto.FLOAT)], {"q": weight.astype(np.float16)}),
        "product": (
            [node("Cast", ["q"], ["c"], to=TensorProto.FLOAT), node("Mul", ["c", "s"], ["w2"])],
            {"q": codes, "s": step},
        ),
        "read back": ([node("DequantizeLinear", ["q", "s"], ["w2"])], {"q": codes, "s": step}),
    }[kind]
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            *behind,
            node("Conv", ["r", "w2"], ["y"], **_SAME),
        ],
        {"y": ("N", 16, 8, 8)},
        {"w": random(16, 3, 3, 3), **stored},
    )


def dead_channels() -> Odd:
    """Half of the channels with weights of 1e-30 or 0 and a bias that is not small."""
    weight, bias = random(8, 3, 3, 3), random(8)
    weight[::2] *= 1e-30
    weight[0], bias[::2] = 0, 0.5
    return odd(
        [
            node("Conv", ["x", "w", "b"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            node("Conv", ["r", "w2"], ["y"], **_SAME),
        ],
        {"y": ("N", 4, 8, 8)},
        {"w": weight, "b": bias, "w2": random(4, 8, 3, 3)},
    )


def matrix_first() -> Odd:
    """A product whose first factor is the constant one, its rows of unlike sizes."""
    mixing = random(6, 4) * np.float32([[0.1], [1], [3], [0.5], [2], [0.3]])
    return odd(
        [node("MatMul", ["m", "x"], ["a"]), node("MatMul", ["a", "w"], ["y"])],
        {"y": ("N", 6, 5)},
        {"m": mixing, "w": random(8, 5)},
        shape=("N", 4, 8),
    )


def averages_with_a_border() -> Odd:
    """Averages that count their border, one with windows that reach beyond it, beside a layer that reads the same,
    behind weights stored as float16."""
    border = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4, "count_include_pad": 1}
    return odd(
        [
            node("Cast", ["q"], ["w"], to=TensorProto.FLOAT),
            node("Conv", ["x", "w", "b"], ["a"], **_SAME),
            node("AveragePool", ["a"], ["y"], **border),
            node("AveragePool", ["a"], ["u"], ceil_mode=1, **border),
            node("Conv", ["a", "w2"], ["z"], **_SAME),
        ],
        {"y": ("N", 4, 4, 4), "u": ("N", 4, 5, 5), "z": ("N", 4, 8, 8)},
        {"q": random(4, 3, 3, 3, scale=3).astype(np.float16), "b": random(4) - 2, "w2": random(4, 4, 3, 3)},
    )


def boxes_beside_scores() -> Odd:
    """A detector's tail: boxes in pixels beside scores, in one output."""
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            node("Conv", ["r", "wb"], ["b"]),
            node("Conv", ["r", "ws"], ["s"]),
            node("Reshape", ["b", "to"], ["br"]),
            node("Reshape", ["s", "to"], ["sr"]),
            node("Sigmoid", ["br"], ["bs"]),
            node("Mul", ["bs", "pixels"], ["boxes"]),
            node("Sigmoid", ["sr"], ["scores"]),
            node("Concat", ["boxes", "scores"], ["y"], axis=1),
        ],
        {"y": ("N", 8, 64)},
        {
            "w": random(8, 3, 3, 3),
            "wb": random(4, 8, 1, 1),
            "ws": random(4, 8, 1, 1, scale=4),
            "to": np.array([0, 4, -1]),
            "pixels": np.float32(320),
        },
    )


def doubles() -> Odd:
    """A product in float64 between two in float32."""
    return odd(
        [
            node("MatMul", ["x", "a"], ["h"]),
            node("Cast", ["h"], ["d"], to=TensorProto.DOUBLE),
            node("MatMul", ["d", "b"], ["e"]),
            node("Tanh", ["e"], ["t"]),
            node("Cast", ["t"], ["f"], to=TensorProto.FLOAT),
            node("MatMul", ["f", "a"], ["y"]),
        ],
        {"y": _ROW},
        {"a": random(8, 8), "b": random(8, 8).astype(np.float64)},
        shape=_ROW,
    )


def unlike_sizes_joined() -> Odd:
    """Two branches, one a hundred times as large, for one convolution that takes both as seriously."""
    shape = ("N", 4, 8, 8)
    weight = random(4, 8, 3, 3).copy()
    weight[:, :4] /= 100
    return odd(
        [
            node("Conv", ["x", "large"], ["a"], **_SAME),
            node("Relu", ["a"], ["ar"]),
            node("Conv", ["x", "small"], ["b"], **_SAME),
            node("Relu", ["b"], ["br"]),
            node("Concat", ["ar", "br"], ["c"], axis=1),
            node("Conv", ["c", "w"], ["y"], **_SAME),
        ],
        {"y": shape},
        {"large": random(4, 3, 3, 3, scale=100.0), "small": random(4, 3, 3, 3), "w": weight},
        shape=_IMAGE,
    )


def spaces_by_axes() -> Odd:
    """Pads and sizes of some axes only, counted from the end, one with its aspect kept, and a convolution that is
    transposed to a given shape, its odd pad at either end."""
    shape = {"kernel_shape": [4, 4], "strides": [2, 2]}
    sized = {"mode": "linear", "axes": [-2, -1]}
    kept = {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": "not_larger"}
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Pad", ["a", "pads", "", "last"], ["p"], mode="edge"),
            node("Resize", ["p", "", "", "sizes"], ["r"], **sized),
            node("Conv", ["r", "w2"], ["y"], **_SAME),
            node("Resize", ["r", "", "", "larger"], ["k"], **kept),
            node("ConvTranspose", ["k", "wt"], ["u"], output_shape=[35, 26], auto_pad="SAME_UPPER", **shape),
            node("ConvTranspose", ["k", "wt"], ["v"], output_shape=[35, 26], **shape),
        ],
        {"y": ("N", 4, 9, 7), "k": ("N", 4, 18, 14), "u": ("N", 3, 35, 26), "v": ("N", 3, 35, 26)},
        {
            "w": random(4, 3, 3, 3, scale=3),
            "w2": random(4, 4, 3, 3),
            "wt": random(4, 3, 4, 4),
            "pads": np.array([1, 3]),
            "last": np.array([-1]),
            "sizes": np.array([9, 7]),
            "larger": np.array([18, 30]),
        },
        opsets=(("", 18),),
    )


def responses_normed() -> Odd:
    """Local response normalization with another bias than 1, as AlexNet's paper has it."""
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["r"]),
            node("LRN", ["r"], ["n"], size=3, alpha=0.02, bias=1.5),
            node("Conv", ["n", "w2"], ["y"], **_SAME),
        ],
        {"y": ("N", 4, 8, 8)},
        {"w": random(8, 3, 3, 3, scale=3), "w2": random(4, 8, 3, 3)},
    )


def resized(scale: float, **how: Any) -> Odd:
    """A convolution, a picture of another size, a convolution."""
    size = int(8 * scale)
    return odd(
        [
            node("Conv", ["x", "w"], ["a"], **_SAME),
            node("Relu", ["a"], ["p"]),
            node("Resize", ["p", "", "scales"], ["r"], **how),
            node("Conv", ["r", "w2"], ["y"], **_SAME),
        ],
        {"y": ("N", 4, size, size)},
        {"scales": np.array([1, 1, scale, scale], np.float32), "w": random(4, 3, 3, 3), "w2": random(4, 4, 3, 3)},
        opsets=(("", 18),),
    )


def constant_beside_answers() -> Odd:
    """An output that no input reaches, as the anchors of a detector."""
    nodes = [
        node("Conv", ["x", "w"], ["a"], **_SAME),
        node("Relu", ["a"], ["y"]),
        node("Identity", ["anchors"], ["k"]),
    ]
    outputs = {"y": ("N", 4, 8, 8), "k": (6, 4)}
    return odd(nodes, outputs, {"w": random(4, 3, 3, 3), "anchors": random(6, 4, scale=30.0)})


ODD: dict[str, Callable[[], Odd]] = {
    "constant beside answers": constant_beside_answers,
    "responses normed": responses_normed,
    "spaces by axes": spaces_by_axes,
    "unlike sizes, joined": unlike_sizes_joined,
    "alpha and beta": lambda: gemm(random(8), alpha=0.5, beta=2.0),
    "bias is one number": lambda: gemm(np.float32(0.7)),
    "bias is one number, scaled": lambda: gemm(np.float32([0.7]), beta=3.0),
    "bias is a row": lambda: gemm(random(1, 8), beta=-1.0),
    "tied matrix": tied_matrix,
    "clip above 0": lambda: clipped(0.5, 6.0),
    "clip below 0": lambda: clipped(-6.0, -0.2),
    "clip around 0": lambda: clipped(-0.5, 0.7),
    "answers on the way": answers_on_the_way,
    "stacked matrices": stacked_matrices,
    "clashing names": clashing_names,
    "branches": branches,
    "branches within branches": branches_within_branches,
    "softmax over axes": softmax_over_axes,
    "gathered by places": gathered_by_places,
    "token joined": token_joined,
    "loop": loop,
    "turned by lengths": turned_by_lengths,
    "loop from outside": loop_from_outside,
    "own function": own_function,
    "weights of float16": lambda: stored_small("float16"),
    "weights of int8, multiplied": lambda: stored_small("product"),
    "weights of int8, read back": lambda: stored_small("read back"),
    "doubles": doubles,
    "dead channels": dead_channels,
    "boxes beside scores": boxes_beside_scores,
    "matrix first": matrix_first,
    "averages with a border": averages_with_a_border,
}

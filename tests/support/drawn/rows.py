"""Operators on sequences (steps x features) and on vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from tests.support.drawn.drawing import OPSET, Drawing, Tensor


def product(d: Drawing, x: Tensor, width: int = 0) -> Tensor:
    """With a matrix, by MatMul (and Add), Gemm in all its forms, or Einsum."""
    features = x.shape[-1]
    width = width or int(d.pick([4, 8, 16]))
    shape = (*x.shape[:-1], width)
    if len(x.shape) == 1 and d.chance(0.6):
        return _gemm(d, x, width)
    if len(x.shape) == 2 and d.chance(0.08):
        return d.put("Einsum", [x, d.weight(features, width, fan=features)], shape, equation="bij,jk->bik")
    if len(x.shape) == 2 and d.chance(0.05):
        return d.put("MatMul", [d.weight(6, x.shape[0], fan=x.shape[0]), x], (6, features))
    made = d.put("MatMul", [x, d.weight(features, width, fan=features)], shape)
    if d.chance(0.6):
        bias = d.bias(width)
        made = d.put("Add", [made, bias] if d.chance(0.7) else [bias, made], shape)
    return made


def _gemm(d: Drawing, x: Tensor, width: int) -> Tensor:
    features = x.shape[0]
    turned = d.chance(0.5)
    weight = d.weight(*((width, features) if turned else (features, width)), fan=features)
    attributes: dict[str, Any] = {"transB": 1} if turned else {}
    inputs: list[Tensor | str] = [x, weight]
    if d.chance(0.2):
        attributes["alpha"] = 0.5
    if d.chance(0.8):
        value = d.rng.standard_normal(width).astype(np.float32) * np.float32(0.3)
        form = d.pick(["vector", "row", "number", "one"], [6, 1, 1, 1])
        value = {"vector": value, "row": value[None], "number": value[0], "one": value[:1]}[form]
        inputs.append(d.constant(value))
        if d.chance(0.2):
            attributes["beta"] = 2.0
    return d.put("Gemm", inputs, (width,), **attributes)


def attention(d: Drawing, x: Tensor) -> Tensor:
    """One head of itself, with a residual."""
    steps, features = x.shape
    query, key, value = (d.raw("MatMul", [x.name, d.weight(features, 8, fan=features)])[0] for _ in range(3))
    (turned,) = d.raw("Transpose", [key], perm=[0, 2, 1])
    (scores,) = d.raw("MatMul", [query, turned])
    (scaled,) = d.raw(d.pick(["Div", "Mul"]), [scores, d.constant(np.float32(d.pick([1.0, 2.0])))])
    if d.chance(0.3):
        mask = np.zeros((steps, steps), np.float32)
        mask[np.triu_indices(steps, 1)] = d.pick([-10000.0, float(np.finfo(np.float32).min)])
        (scaled,) = d.raw("Add", [scaled, d.constant(mask)])
    (share,) = d.raw("Softmax", [scaled], axis=-1)
    (mixed,) = d.raw("MatMul", [share, value])
    (back,) = d.raw("MatMul", [mixed, d.weight(8, features, fan=8)])
    return d.put("Add", [x, back], x.shape)


def layer_norm(d: Drawing, x: Tensor) -> Tensor:
    """As one operator, or of its parts as older exporters write it."""
    features = x.shape[-1]
    scale, shift = d.constant(d.rng.uniform(0.5, 1.5, features).astype(np.float32)), d.bias(features)
    if d.chance(0.5):
        return d.put("LayerNormalization", [x, scale, shift], x.shape, axis=-1, epsilon=1e-5)
    (mean,) = d.raw("ReduceMean", [x.name], axes=[-1], keepdims=1)
    (centred,) = d.raw("Sub", [x.name, mean])
    (square,) = d.raw("Pow", [centred, d.constant(np.float32(2))])
    (variance,) = d.raw("ReduceMean", [square], axes=[-1], keepdims=1)
    (more,) = d.raw("Add", [variance, d.constant(np.float32(1e-5))])
    (deviation,) = d.raw("Sqrt", [more])
    (unit,) = d.raw("Div", [centred, deviation])
    (scaled,) = d.raw("Mul", [unit, scale])
    return d.put("Add", [scaled, shift], x.shape)


def recurrent(d: Drawing, x: Tensor) -> Tensor:
    """LSTM or GRU, forward, backward or both ways."""
    steps, features = x.shape
    operator, gates = d.pick([("LSTM", 4), ("GRU", 3)])
    direction = d.pick(["forward", "reverse", "bidirectional"], [3, 1, 1])
    ways, hidden = 1 + (direction == "bidirectional"), 8
    (turned,) = d.raw("Transpose", [x.name], perm=[1, 0, 2])
    inputs = [
        turned,
        d.weight(ways, gates * hidden, features, fan=features),
        d.weight(ways, gates * hidden, hidden, fan=hidden),
    ]
    if d.chance(0.8):
        inputs.append(d.constant((d.rng.standard_normal((ways, 2 * gates * hidden)) * 0.2).astype(np.float32)))
    more = {"linear_before_reset": 1} if operator == "GRU" and d.chance(0.7) else {}
    answer = d.raw(operator, inputs, hidden_size=hidden, direction=direction, **more)[0]
    (back,) = d.raw("Transpose", [answer], perm=[2, 0, 1, 3])
    return d.put("Reshape", [back, d.constant(np.array([0, steps, ways * hidden]))], (steps, ways * hidden))


def convolution(d: Drawing, x: Tensor) -> Tensor:
    """Along the steps."""
    steps, features = x.shape
    (turned,) = d.raw("Transpose", [x.name], perm=[0, 2, 1])
    kernel = 3 if steps >= 3 else 1
    weight = d.weight(8, features, kernel, fan=features * kernel)
    (made,) = d.raw("Conv", [turned, weight, d.bias(8)], kernel_shape=[kernel], pads=[kernel // 2] * 2)
    if d.chance(0.3) and steps >= 4:
        (made,) = d.raw("MaxPool", [made], kernel_shape=[2], strides=[2])
        steps //= 2
    return d.put("Transpose", [made], (steps, 8), perm=[0, 2, 1])


def moved(d: Drawing, x: Tensor) -> Tensor:
    """Cut, turned, reduced, picked from."""
    steps, features = x.shape
    how = d.pick(["slice", "turn", "mean", "first", "split", "picture", "pad", "sum"])
    if how == "slice" and steps > 2:
        return d.put("Slice", [x, *(d.constant(np.array([one])) for one in (1, 2**31, 1))], (steps - 1, features))
    if how == "turn":
        return d.put("Transpose", [x], (features, steps), perm=[0, 2, 1])
    if how == "first":
        return d.put("Gather", [x, d.constant(np.int64(d.pick([0, -1])))], (features,), axis=1)
    if how == "split" and features % 2 == 0:
        left, right = d.raw("Split", [x.name], 2, axis=-1)
        (gate,) = d.raw("Sigmoid", [right])
        return d.put("Mul", [left, gate], (steps, features // 2))
    if how == "picture" and features % 2 == 0 and steps > 1:
        return d.put("Reshape", [x, d.constant(np.array([0, features // 2, 2, steps]))], (features // 2, 2, steps))
    if how == "sum":
        return d.put("ReduceSum", [x, d.constant(np.array([1]))], (features,), keepdims=0)
    operator = d.pick(["ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2"], [4, 1, 1, 1])
    return d.put(operator, [x], (features,), axes=[1], keepdims=0)


def looked_up(d: Drawing) -> Tensor:
    """Words of a table, with places added."""
    ids = d.input((6,), table=20)
    rows = d.put("Gather", [d.constant(d.rng.standard_normal((20, 8)).astype(np.float32)), ids.name], (6, 8), axis=0)
    return d.put("Add", [rows, d.constant(d.rng.standard_normal((6, 8)).astype(np.float32))], (6, 8))


def activation(d: Drawing, x: Tensor) -> Tensor:
    """Any of the usual ones, as one operator or as exporters write them."""
    of = [
        "Relu", "Clip", "silu", "HardSwish", "gelu", "Sigmoid", "LeakyRelu", "HardSigmoid", "Tanh", "PRelu", "Elu",
        "where", "function", "Softplus", "softmax", "Abs",
    ]  # fmt: skip
    kind = d.pick(of, [8, 3, 5, 2, 2, 2, 2, 1, 1, 1, 0.5, 0.5, 0.4, 0.3, 0.7, 0.3])
    if kind == "silu":
        return d.put("Mul", [x, d.put("Sigmoid", [x], x.shape)], x.shape)
    if kind == "gelu":
        return _gelu(d, x)
    if kind == "where":
        (negative,) = d.raw("Less", [x.name, d.constant(np.float32(0))])
        (small,) = d.raw("Mul", [x.name, d.constant(np.float32(0.1))])
        return d.put("Where", [negative, small, x], x.shape)
    if kind == "function":
        return _function(d, x)
    if kind == "softmax":
        return d.put("Softmax", [x], x.shape, axis=-1 if len(x.shape) < 3 else 1)
    if kind == "Clip":
        low, high = d.pick([(0.0, 6.0), (-1.0, 1.0), (0.1, 4.0), (None, 3.0), (0.0, None)], [6, 1, 1, 1, 1])
        ends = ["" if end is None else d.constant(np.float32(end)) for end in (low, high)]
        return d.put("Clip", [x, *ends], x.shape)
    if kind == "PRelu":
        slope = d.rng.uniform(0.05, 0.3, (x.shape[0], 1, 1) if len(x.shape) == 3 else x.shape[-1:])
        return d.put(kind, [x, d.constant(slope.astype(np.float32))], x.shape)
    attributes = {"LeakyRelu": {"alpha": 0.1}, "Elu": {"alpha": 1.0}, "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5}}
    return d.put(kind, [x], x.shape, **attributes.get(kind, {}))


def _gelu(d: Drawing, x: Tensor) -> Tensor:
    (part,) = d.raw("Div", [x.name, d.constant(np.float32(np.sqrt(2)))])
    (error,) = d.raw("Erf", [part])
    (more,) = d.raw("Add", [error, d.constant(np.float32(1))])
    (both,) = d.raw("Mul", [x.name, more])
    return d.put("Mul", [both, d.constant(np.float32(0.5))], x.shape)


def _function(d: Drawing, x: Tensor) -> Tensor:
    if not d.functions:
        inner = [helper.make_node("Sigmoid", ["X"], ["S"]), helper.make_node("Mul", ["X", "S"], ["Y"])]
        d.functions.append(helper.make_function("own", "Swish", ["X"], ["Y"], inner, [helper.make_opsetid("", OPSET)]))
    return d.put("Swish", [x], x.shape, domain="own")


def branch(d: Drawing, x: Tensor) -> Tensor:
    """An If whose branches read what is around them."""
    axes = list(range(len(x.shape) + 1))
    (mean,) = d.raw("ReduceMean", [x.name], axes=axes, keepdims=0)
    (positive,) = d.raw("Greater", [mean, d.constant(np.float32(0))])
    factor = d.constant(d.rng.uniform(0.5, 2, x.shape[-1]).astype(np.float32))
    graphs = []
    for operator in ("Mul", "Add"):
        name = d.name()
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *x.shape])
        inner = helper.make_node(operator, [x.name, factor], [name], name=f"{operator} {name}")
        graphs.append(helper.make_graph([inner], operator, [], [value]))
    return d.put("If", [positive], x.shape, then_branch=graphs[0], else_branch=graphs[1])

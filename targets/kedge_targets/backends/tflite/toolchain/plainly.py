"""Converts ONNX to TensorFlow operator by operator, with axes known at every step: for graphs that onnx2tf cannot
convert, or whose axes it confuses.

Images are computed with channels last, as in TFLite; a tensor is transposed if an operator needs the ONNX order.
"""

import copy
import math

import moving
import numpy
import windows
from values import RefusedError, Value, attributes_of, constant, in_last, last_axis


class Model:
    """A graph with fixed shapes as a TensorFlow function; ``inputs`` holds the shapes and dtypes that it takes.

    Args:
        model: the ONNX model.
        keep: inputs in the ONNX order; the others have channels last.
    """

    def __init__(self, model, keep):
        import onnx
        import tensorflow as tf

        self._graph = model.graph
        self._constants = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
        self._turned = []
        self.inputs = []
        for value in model.graph.input:
            kind = value.type.tensor_type
            shape = [int(dim.dim_value) for dim in kind.shape.dim]
            turned = len(shape) > 2 and value.name not in keep
            self._turned.append(turned)
            shape = [shape[0], *shape[2:], shape[1]] if turned else shape
            dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
            self.inputs.append(tf.TensorSpec(shape, dtype))
        _check(model.graph)

    def __call__(self, inputs):
        """Return the outputs, each in the order of axes in which it was made."""
        made = dict(self._constants)
        for value, tensor, turned in zip(self._graph.input, inputs, self._turned, strict=True):
            made[value.name] = Value(last=tensor) if turned else Value(first=tensor)
        _run(self._graph, made)
        return [_answer(made[value.name]) for value in self._graph.output]


def _check(graph):
    for node in graph.node:
        if node.op_type == "If":
            for branch in attributes_of(node).values():
                _check(branch)
        elif node.domain not in ("", "ai.onnx", "com.microsoft") or node.op_type not in OPERATORS:
            raise RefusedError(f"the operator {node.op_type} cannot be converted", node)


def _run(graph, made):
    """Add what each node computes to the tensors that are made, by name."""
    for node in graph.node:
        given = [made[name] if name else None for name in node.input]
        try:
            if node.op_type == "If":
                found = _branched(node, given[0], made)
            else:
                found = OPERATORS[node.op_type](node, given, attributes_of(node))
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(f"{type(error).__name__}: {error}", node) from error
        answers = found if isinstance(found, list) else [found]
        made.update(zip(node.output, answers, strict=False))


def _branched(node, condition, made):
    import onnx
    import tensorflow as tf

    def branch(graph):
        def run():
            # What a branch transposes is seen by no other.
            inner = {name: copy.copy(value) if isinstance(value, Value) else value for name, value in made.items()}
            inner.update((one.name, onnx.numpy_helper.to_array(one)) for one in graph.initializer)
            _run(graph, inner)
            return [tf.identity(_first(inner[value.name])) for value in graph.output]

        return run

    how = attributes_of(node)
    decided = tf.reshape(_first(condition), [])
    found = tf.cond(decided, branch(how["then_branch"]), branch(how["else_branch"]))
    return [Value(first=one) for one in found]


def _answer(value):
    import tensorflow as tf

    if isinstance(value, Value):
        return tf.identity(value.last if value.native_last else value.first)
    return tf.identity(tf.constant(value))


def _first(value):
    return value.first if isinstance(value, Value) else value


def _each(compute):
    """Return an element-wise operator with any number of inputs that broadcast."""

    def run(node, given, attributes):
        values = [one for one in given if isinstance(one, Value)]
        if not values:
            return numpy.asarray(compute(*given))
        rank = max(len(one.shape) for one in given)
        if rank > 2 and any(one.native_last and len(one.shape) == rank for one in values):
            return Value(last=compute(*(in_last(one, rank) for one in given)))
        return Value(first=compute(*(_first(one) for one in given)))

    return run


def _of_tf(name):
    import tensorflow as tf

    found = tf
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _named(name):
    return _each(lambda *given: _of_tf(name)(*given))


def _folded(name):
    """Return a function that applies an operator to any number of inputs, pair by pair."""

    def compute(*given):
        found = given[0]
        for one in given[1:]:
            found = _of_tf(name)(found, one)
        return found

    return _each(compute)


def _with(compute):
    """Return an element-wise operator that reads its attributes."""

    def run(node, given, attributes):
        return _each(lambda *numbers: compute(attributes, *numbers))(node, given, attributes)

    return run


def _clip(node, given, attributes):
    import tensorflow as tf

    low = constant(node, given, 1, attributes.get("min"))
    high = constant(node, given, 2, attributes.get("max"))
    low = -math.inf if low is None else float(numpy.reshape(low, -1)[0])
    high = math.inf if high is None else float(numpy.reshape(high, -1)[0])

    def compute(x):
        if (low, high) == (0.0, 6.0):
            return tf.nn.relu6(x)
        x = tf.maximum(x, numpy.float32(low)) if low > -math.inf else x
        return tf.minimum(x, numpy.float32(high)) if high < math.inf else x

    return _each(compute)(node, given[:1], attributes)


def _error_function(x):
    """Compute erf after Abramowitz and Stegun, 7.1.26: within 1.5e-7."""
    import tensorflow as tf

    size = tf.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return tf.sign(x) * (1.0 - series * tf.exp(-size * size))


def _slope(x, slope):
    import tensorflow as tf

    return tf.nn.relu(x) - slope * tf.nn.relu(-x)


def _softmax(node, given, attributes):
    import tensorflow as tf

    value = given[0]
    axis = attributes.get("axis", -1) % len(value.shape)
    if value.native_last:
        return Value(last=tf.nn.softmax(value.last, axis=last_axis(axis, len(value.shape))))
    return Value(first=tf.nn.softmax(value.first, axis=axis))


def _layer_norm(node, given, attributes):
    import tensorflow as tf

    x, rank = given[0].first, len(given[0].shape)
    axes = list(range(attributes.get("axis", -1) % rank, rank))
    centred = x - tf.reduce_mean(x, axes, keepdims=True)
    variance = tf.reduce_mean(centred * centred, axes, keepdims=True)
    found = centred / tf.sqrt(variance + attributes.get("epsilon", 1e-5)) * _first(given[1])
    return Value(first=found + _first(given[2]) if len(given) > 2 and given[2] is not None else found)


def _matmul(node, given, attributes):
    return Value(first=_product(_first(given[0]), _first(given[1])))


def _product(left, right):
    import tensorflow as tf

    if isinstance(right, numpy.ndarray) and right.ndim == 2 and len(left.shape) > 2:
        rows = tf.matmul(tf.reshape(left, [-1, right.shape[0]]), right)
        return tf.reshape(rows, [*left.shape[:-1], right.shape[1]])
    if len(left.shape) == 1:
        return tf.squeeze(tf.matmul(left[None], right), -2)
    if len(right.shape) == 1:
        return tf.squeeze(tf.matmul(left, right[:, None]), -1)
    return tf.matmul(left, right)


def _gemm(node, given, attributes):
    import tensorflow as tf

    left, right = (_first(one) for one in given[:2])
    left = tf.transpose(left) if attributes.get("transA", 0) else left
    if attributes.get("transB", 0):
        right = right.T if isinstance(right, numpy.ndarray) else tf.transpose(right)
    alpha, beta = (numpy.float32(attributes.get(name, 1.0)) for name in ("alpha", "beta"))
    found = tf.matmul(left, right * alpha if alpha != 1 else right)
    if len(given) > 2 and given[2] is not None:
        found = found + (_first(given[2]) * beta if beta != 1 else _first(given[2]))
    return Value(first=found)


def _einsum(node, given, attributes):
    import tensorflow as tf

    return Value(first=tf.einsum(attributes["equation"].decode(), *(_first(one) for one in given)))


def _lookup(node, given, attributes):
    """Convert Gather."""
    import tensorflow as tf

    data, indices = given[0], _first(given[1])
    rank = len(data.shape)
    axis = attributes.get("axis", 0) % rank
    if isinstance(indices, numpy.ndarray):
        indices = numpy.where(indices < 0, indices + data.shape[axis], indices).astype(numpy.int32)
        if not isinstance(data, Value):
            return numpy.take(data, indices, axis)
        if data.native_last and indices.ndim == 1:
            return Value(last=tf.gather(data.last, indices, axis=last_axis(axis, rank)))
    return Value(first=tf.gather(_first(data), indices, axis=axis))


def _cast(node, given, attributes):
    import onnx
    import tensorflow as tf

    kind = onnx.helper.tensor_dtype_to_np_dtype(attributes["to"])
    if not isinstance(given[0], Value):
        return given[0].astype(kind)
    return _each(lambda x: tf.cast(x, kind))(node, given, attributes)


def _stored(node, given, attributes):
    """Convert Constant."""
    import onnx

    name, value = next(iter(attributes.items()))
    if name == "value":
        return onnx.numpy_helper.to_array(value)
    return numpy.asarray(value, numpy.float32 if "float" in name else numpy.int64)


def _shape(node, given, attributes):
    return numpy.array(given[0].shape, numpy.int64)


def _hard_sigmoid(attributes, x):
    import tensorflow as tf

    return tf.clip_by_value(attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5), 0.0, 1.0)


_BY_NAME = {
    "Abs": "abs", "Add": "add", "And": "logical_and", "Ceil": "math.ceil", "Cos": "cos", "Div": "divide",
    "Elu": "nn.elu", "Equal": "equal", "Exp": "exp", "Floor": "floor", "Greater": "greater",
    "GreaterOrEqual": "greater_equal", "Less": "less", "LessOrEqual": "less_equal", "Log": "math.log",
    "Mul": "multiply", "Neg": "negative", "Not": "logical_not", "Or": "logical_or", "Pow": "pow", "Relu": "nn.relu",
    "Round": "round", "Selu": "nn.selu", "Sigmoid": "sigmoid", "Sign": "sign", "Sin": "sin",
    "Softplus": "nn.softplus", "Softsign": "nn.softsign", "Sqrt": "sqrt", "Sub": "subtract", "Tanh": "tanh",
    "Where": "where",
}  # fmt: skip
"""Operators that have a different name in TensorFlow."""

OPERATORS = {
    **moving.OPERATORS,
    **windows.OPERATORS,
    **{operator: _named(name) for operator, name in _BY_NAME.items()},
    "Cast": _cast,
    "Clip": _clip,
    "Constant": _stored,
    "Dropout": _each(lambda x, *_: x),
    "Einsum": _einsum,
    "Erf": _each(_error_function),
    "Gather": _lookup,
    # The exact one needs an operator (Erfc) that TFLite has not; this one is within 5e-4 of it.
    "Gelu": _each(lambda x: _of_tf("nn.gelu")(x, approximate=True)),
    "Gemm": _gemm,
    "HardSigmoid": _with(_hard_sigmoid),
    "HardSwish": _each(lambda x: x * _of_tf("nn.relu6")(x + 3.0) * numpy.float32(1 / 6)),
    "Identity": _each(lambda x: x),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _with(lambda how, x: _of_tf("nn.leaky_relu")(x, how.get("alpha", 0.01))),
    "MatMul": _matmul,
    "Max": _folded("maximum"),
    "Mean": _each(lambda *given: sum(given[1:], given[0]) / numpy.float32(len(given))),
    "Min": _folded("minimum"),
    "PRelu": _each(_slope),
    "Reciprocal": _each(lambda x: 1.0 / x),
    "Shape": _shape,
    "Softmax": _softmax,
    "Sum": _folded("add"),
}

"""Tensors during conversion from ONNX to TensorFlow, in the order of axes in which they were made."""


class RefusedError(Exception):
    """A node that cannot be converted."""

    def __init__(self, what, node):
        super().__init__(what)
        self.node = node


class Value:
    """A tensor, in ONNX's order of axes or with channels last; transposed when first needed.

    Attributes:
        native_last: whether it was made with channels last.
        shape: shape in ONNX's order.
    """

    def __init__(self, first=None, last=None):
        self._first, self._last = first, last
        self.native_last = first is None
        made = [int(size) for size in (last if first is None else first).shape]
        self.shape = [made[0], made[-1], *made[1:-1]] if self.native_last else made

    @property
    def first(self):
        """Return the tensor in ONNX's order of axes."""
        if self._first is None:
            self._first = turned(self._last, to_first(len(self.shape)))
        return self._first

    @property
    def last(self):
        """Return the tensor with channels last."""
        if self._last is None:
            self._last = turned(self._first, to_last(len(self.shape)))
        return self._last


def turned(tensor, order):
    """Transpose a tensor, with a Reshape if only axes of size 1 move."""
    import tensorflow as tf

    shape = [int(size) for size in tensor.shape]
    wide = [axis for axis in order if shape[axis] != 1]
    if wide == sorted(wide):
        return tf.reshape(tensor, [shape[axis] for axis in order])
    return tf.transpose(tensor, order)


def to_last(rank):
    """Return the permutation from ONNX's order of axes to channels last."""
    return [0, *range(2, rank), 1]


def to_first(rank):
    """Return the permutation from channels last to ONNX's order of axes."""
    return [0, rank - 1, *range(1, rank - 1)]


def last_axis(axis, rank):
    """Return the position of an axis of ONNX's order with channels last."""
    return to_last(rank).index(axis % rank)


def in_last(value, rank):
    """Return the tensor with channels last, after adding axes of size 1 in front as broadcasting does."""
    import tensorflow as tf

    missing = rank - len(value.shape)
    if isinstance(value, Value):
        if not missing:
            return value.last
        return turned(tf.reshape(value.first, [1] * missing + value.shape), to_last(rank))
    return value if value.ndim == 0 else value.reshape([1] * missing + list(value.shape)).transpose(to_last(rank))


def attributes_of(node):
    """Return a node's attributes: name → value."""
    import onnx

    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def constant(node, given, at, default=None):
    """Return an input's array, which must be constant, or the default if there is none."""
    value = given[at] if len(given) > at else None
    if isinstance(value, Value):
        raise RefusedError(f"its input {node.input[at]!r} is not constant", node)
    return default if value is None else value

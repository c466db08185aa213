"""Tensors on their way from ONNX to TensorFlow, in the order of axes in which they were made."""


class RefusedError(Exception):
    """A node that cannot be converted."""

    def __init__(self, what, node):
        super().__init__(what)
        self.node = node


class Value:
    """A tensor, in ONNX's order of axes or with channels last; turned at the first need.

    Attributes:
        native_last: whether it was made with channels last.
        shape: in ONNX's order.
    """

    def __init__(self, first=None, last=None):
        self._first, self._last = first, last
        self.native_last = first is None
        made = [int(size) for size in (last if first is None else first).shape]
        self.shape = [made[0], made[-1], *made[1:-1]] if self.native_last else made

    @property
    def first(self):
        """In ONNX's order."""
        if self._first is None:
            self._first = turned(self._last, to_first(len(self.shape)))
        return self._first

    @property
    def last(self):
        """With channels last."""
        if self._last is None:
            self._last = turned(self._first, to_last(len(self.shape)))
        return self._last


def turned(tensor, order):
    """Transposed; by a Reshape where only axes of size 1 move."""
    import tensorflow as tf

    shape = [int(size) for size in tensor.shape]
    wide = [axis for axis in order if shape[axis] != 1]
    if wide == sorted(wide):
        return tf.reshape(tensor, [shape[axis] for axis in order])
    return tf.transpose(tensor, order)


def to_last(rank):
    """Order of axes from ONNX's to channels last."""
    return [0, *range(2, rank), 1]


def to_first(rank):
    """Back."""
    return [0, rank - 1, *range(1, rank - 1)]


def last_axis(axis, rank):
    """Where an axis of ONNX's order is with channels last."""
    return to_last(rank).index(axis % rank)


def in_last(value, rank):
    """With channels last, after axes of size 1 were put in front as broadcasting does."""
    import tensorflow as tf

    missing = rank - len(value.shape)
    if isinstance(value, Value):
        if not missing:
            return value.last
        return turned(tf.reshape(value.first, [1] * missing + value.shape), to_last(rank))
    return value if value.ndim == 0 else value.reshape([1] * missing + list(value.shape)).transpose(to_last(rank))


def attributes_of(node):
    """Name → value."""
    import onnx

    return {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}


def constant(node, given, at, default=None):
    """An input's array, which must be constant; the default where there is none."""
    value = given[at] if len(given) > at else None
    if isinstance(value, Value):
        raise RefusedError(f"its input {node.input[at]!r} is not constant", node)
    return default if value is None else value

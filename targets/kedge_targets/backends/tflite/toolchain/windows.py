"""Converts convolutions, windows and norms from ONNX to TensorFlow. Formulas as in ONNX's operators of these names."""

import numpy
from values import RefusedError, Value, constant


def _windows(attributes, sizes, kernel):
    """Return strides, dilations, the dilated kernel sizes, and the padding before and behind each spatial axis."""
    axes = len(kernel)
    strides, dilations = (list(attributes.get(name, [1] * axes)) for name in ("strides", "dilations"))
    spans = [(width - 1) * gap + 1 for width, gap in zip(kernel, dilations, strict=True)]
    how = attributes.get("auto_pad", b"NOTSET").decode()
    if how in ("NOTSET", "VALID"):
        numbers = [0] * 2 * axes if how == "VALID" else list(attributes.get("pads", [0] * 2 * axes))
        return strides, dilations, spans, [(numbers[i], numbers[i + axes]) for i in range(axes)]
    pads = []
    for size, span, stride in zip(sizes, spans, strides, strict=True):
        whole = max(0, (-(-size // stride) - 1) * stride + span - size)
        less = whole // 2
        pads.append((less, whole - less) if how == "SAME_UPPER" else (whole - less, less))
    return strides, dilations, spans, pads


def _spread(weight, dilations):
    """Return a kernel (with the spatial axes after the first two) with zeros in its gaps."""
    for axis, gap in enumerate(dilations, start=2):
        if gap > 1:
            shape = list(weight.shape)
            shape[axis] = (shape[axis] - 1) * gap + 1
            wide = numpy.zeros(shape, weight.dtype)
            wide[(slice(None),) * axis + (slice(None, None, gap),)] = weight
            weight = wide
    return weight


def _padded(x, pads, value=0.0):
    """Pad the spatial axes of a tensor with channels last."""
    import tensorflow as tf

    if not any(side for pair in pads for side in pair):
        return x
    return tf.pad(x, [(0, 0), *pads, (0, 0)], constant_values=value)


def _flat(x):
    """Return a 1-D signal as an image of one row, and whether it was one."""
    import tensorflow as tf

    return (tf.expand_dims(x, 1), True) if len(x.shape) == 3 else (x, False)


def _convolution(node, given, attributes):
    import tensorflow as tf

    x, weight = given[0].last, constant(node, given, 1)
    axes = weight.ndim - 2
    if axes > 2:
        raise RefusedError("it has more than two axes of space", node)
    sizes = [int(size) for size in x.shape[1:-1]]
    strides, dilations, _, pads = _windows(attributes, sizes, list(weight.shape[2:]))
    if any(gap > 1 for gap in dilations) and any(step > 1 for step in strides):
        weight, dilations = _spread(weight, dilations), [1] * axes
    same = _windows({**attributes, "auto_pad": b"SAME_UPPER"}, sizes, list(weight.shape[2:]))[3]
    how = "SAME" if pads == same and any(side for pair in pads for side in pair) else "VALID"
    x, row = _flat(x if how == "SAME" else _padded(x, pads))
    if row:
        weight = weight[:, :, None]
        strides, dilations = [strides[0]] * 2, [1, dilations[0]]
    groups = attributes.get("group", 1)
    kernel = weight.transpose(2, 3, 1, 0)  # height, width, of one group's channels, filters
    channels = int(x.shape[-1])
    if groups == channels > 1 and strides[0] == strides[1]:
        wide = weight.reshape(channels, -1, *weight.shape[2:]).transpose(2, 3, 0, 1)
        y = tf.nn.depthwise_conv2d(x, wide, [1, *strides, 1], how, dilations=dilations)
    else:
        parts, kernels = tf.split(x, groups, -1), numpy.split(kernel, groups, -1)
        found = [tf.nn.conv2d(a, k, strides, how, dilations=dilations) for a, k in zip(parts, kernels, strict=True)]
        y = tf.concat(found, -1) if groups > 1 else found[0]
    bias = constant(node, given, 2)
    y = tf.nn.bias_add(y, bias) if bias is not None else y
    return Value(last=tf.squeeze(y, 1) if row else y)


def _transposed_convolution(node, given, attributes):
    import tensorflow as tf

    x, weight = given[0].last, constant(node, given, 1)
    axes = weight.ndim - 2
    if axes > 2 or "output_shape" in attributes:
        raise RefusedError("it has more than two axes of space, or output_shape is set", node)
    strides, dilations, spans, pads = _windows(attributes, [1] * axes, list(weight.shape[2:]))
    extra = list(attributes.get("output_padding", [0] * axes))
    sizes = [int(size) for size in x.shape[1:-1]]
    how = attributes.get("auto_pad", b"NOTSET").decode()
    if how.startswith("SAME"):
        whole = [max(0, span + more - step) for span, more, step in zip(spans, extra, strides, strict=True)]
        pads = [(one // 2, one - one // 2) if how == "SAME_UPPER" else (one - one // 2, one // 2) for one in whole]
    weight = _spread(weight, dilations)
    groups = attributes.get("group", 1)
    if groups > 1:
        many, few = weight.shape[:2]
        dense = numpy.zeros((many, few * groups, *weight.shape[2:]), weight.dtype)
        for group in range(groups):
            rows = slice(group * many // groups, (group + 1) * many // groups)
            dense[rows, group * few : (group + 1) * few] = weight[rows]
        weight = dense
    x, row = _flat(x)
    if row:
        weight, sizes, strides = weight[:, :, None], [1, *sizes], [1, *strides]
        spans, extra, pads = [1, *spans], [0, *extra], [(0, 0), *pads]
    whole = [(s - 1) * step + span + more for s, step, span, more in zip(sizes, strides, spans, extra, strict=True)]
    shape = [int(x.shape[0]), *whole, weight.shape[1]]
    y = tf.nn.conv2d_transpose(x, weight.transpose(2, 3, 1, 0), shape, strides, "VALID")
    (top, bottom), (left, right) = pads
    y = y[:, top : whole[0] - bottom, left : whole[1] - right]
    bias = constant(node, given, 2)
    y = tf.nn.bias_add(y, bias) if bias is not None else y
    return Value(last=tf.squeeze(y, 1) if row else y)


def _pooled(node, given, attributes):
    import tensorflow as tf

    if len([name for name in node.output if name]) > 1:
        raise RefusedError("it gives indices", node)
    x = given[0].last
    kernel = list(attributes["kernel_shape"])
    sizes = [int(size) for size in x.shape[1:-1]]
    strides, dilations, spans, pads = _windows(attributes, sizes, kernel)
    if len(kernel) > 2 or any(gap > 1 for gap in dilations):
        raise RefusedError("its windows have gaps or more than two axes", node)
    given_pads = pads
    if attributes.get("ceil_mode", 0):
        pads = [_reached(*one) for one in zip(sizes, spans, strides, pads, strict=True)]
    largest = node.op_type == "MaxPool"
    # A tensor that holds the lowest float has no scale in integers: TensorFlow's own padding of a maximum is none.
    same = largest and pads == _windows({**attributes, "auto_pad": b"SAME_UPPER"}, sizes, kernel)[3]
    x, row = _flat(x if same else _padded(x, pads, numpy.finfo(numpy.float32).min if largest else 0.0))
    window, steps = ([1, *kernel], [1, *strides]) if row else (kernel, strides)
    y = (tf.nn.max_pool2d if largest else tf.nn.avg_pool2d)(x, window, steps, "SAME" if same else "VALID")
    y = tf.squeeze(y, 1) if row else y
    if not largest:
        inside = given_pads if attributes.get("count_include_pad", 0) else [(0, 0)] * len(sizes)
        shares = _shares(sizes, kernel, strides, pads, inside)
        y = y if shares is None else y * shares
    return Value(last=y)


def _reached(size, span, stride, pad):
    """Return the padding, extended by how far a last partial window reaches beyond the end."""
    before, behind = pad
    windows = -(-(size + before + behind - span) // stride) + 1
    if (windows - 1) * stride >= size + before:
        windows -= 1
    return before, max(behind, (windows - 1) * stride + span - size - before)


def _shares(sizes, kernel, strides, pads, inside):
    """Return the factors that turn means over whole windows into means over the elements that count; None if all are
    1."""
    factors = []
    for size, width, stride, (before, behind), (low, high) in zip(sizes, kernel, strides, pads, inside, strict=True):
        counted = numpy.zeros(size + before + behind, numpy.float32)
        counted[before - low : before + size + high] = 1
        starts = range(0, len(counted) - width + 1, stride)
        factors.append(numpy.array([width / counted[start : start + width].sum() for start in starts], numpy.float32))
    if all((one == 1).all() for one in factors):
        return None
    whole = factors[0] if len(factors) == 1 else factors[0][:, None] * factors[1]
    return whole[None, ..., None]


def _pooled_whole(node, given, attributes):
    import tensorflow as tf

    reduce = tf.reduce_mean if node.op_type == "GlobalAveragePool" else tf.reduce_max
    x = given[0].last
    return Value(last=reduce(x, list(range(1, len(x.shape) - 1)), keepdims=True))


def _batch_norm(node, given, attributes):
    scale, shift, mean, variance = (constant(node, given, at) for at in range(1, 5))
    factor = scale / numpy.sqrt(variance + attributes.get("epsilon", 1e-5))
    factor, shift = factor.astype(numpy.float32), (shift - mean * factor).astype(numpy.float32)
    if len(given[0].shape) < 3:
        return Value(first=given[0].first * factor + shift)
    return Value(last=given[0].last * factor + shift)


def _instance_norm(node, given, attributes):
    import tensorflow as tf

    x = given[0].last
    axes = list(range(1, len(x.shape) - 1))
    centred = x - tf.reduce_mean(x, axes, keepdims=True)
    deviation = tf.sqrt(tf.reduce_mean(centred * centred, axes, keepdims=True) + attributes.get("epsilon", 1e-5))
    return Value(last=centred / deviation * constant(node, given, 1) + constant(node, given, 2))


OPERATORS = {
    "AveragePool": _pooled, "BatchNormalization": _batch_norm, "Conv": _convolution,
    "ConvTranspose": _transposed_convolution, "GlobalAveragePool": _pooled_whole, "GlobalMaxPool": _pooled_whole,
    "InstanceNormalization": _instance_norm, "MaxPool": _pooled,
}  # fmt: skip

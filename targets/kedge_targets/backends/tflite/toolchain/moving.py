"""Converts operators that slice, join, reduce or rearrange from ONNX to TensorFlow; formulas as in ONNX's operators."""

import numpy
from values import RefusedError, Value, constant, in_last, last_axis, to_first, to_last, turned


def _joined(node, given, attributes):
    import tensorflow as tf

    if not any(isinstance(one, Value) for one in given):
        return numpy.concatenate(given, attributes["axis"])
    rank = len(given[0].shape)
    axis = attributes["axis"] % rank
    if rank > 2 and any(isinstance(one, Value) and one.native_last for one in given):
        return Value(last=tf.concat([in_last(one, rank) for one in given], last_axis(axis, rank)))
    return Value(first=tf.concat([one.first if isinstance(one, Value) else one for one in given], axis))


def _split(node, given, attributes):
    import tensorflow as tf

    value, rank = given[0], len(given[0].shape)
    axis = attributes.get("axis", 0) % rank
    count = len(node.output)
    whole = value.shape[axis]
    part = -(-whole // count)
    sizes = constant(node, given, 1, [part] * (count - 1) + [whole - part * (count - 1)])
    sizes = [int(size) for size in sizes]
    if value.native_last:
        return [Value(last=one) for one in tf.split(value.last, sizes, last_axis(axis, rank))]
    return [Value(first=one) for one in tf.split(value.first, sizes, axis)]


def _cut(node, given, attributes):
    """Convert Slice."""
    value, rank = given[0], len(given[0].shape)
    starts, ends = (list(constant(node, given, at)) for at in (1, 2))
    axes = list(constant(node, given, 3, range(len(starts))))
    steps = list(constant(node, given, 4, [1] * len(starts)))
    where = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = value.shape[axis % rank]
        begin, stop, step = slice(int(start), int(end), int(step)).indices(size)
        where[axis % rank] = slice(begin, stop if stop >= 0 else None, step)
    if not isinstance(value, Value):
        return value[tuple(where)]
    if value.native_last:
        return Value(last=value.last[tuple(where[axis] for axis in to_last(rank))])
    return Value(first=value.first[tuple(where)])


def _pad(node, given, attributes):
    import tensorflow as tf

    value, rank = given[0], len(given[0].shape)
    numbers = [int(one) for one in constant(node, given, 1, attributes.get("pads"))]
    axes = [int(axis) % rank for axis in constant(node, given, 3, range(rank))]
    pads = [(0, 0)] * rank
    for at, axis in enumerate(axes):
        pads[axis] = (numbers[at], numbers[at + len(axes)])
    if any(side < 0 for pair in pads for side in pair):
        raise RefusedError("it cuts (negative pads)", node)
    x = value.last if value.native_last else value.first
    pads = [pads[axis] for axis in to_last(rank)] if value.native_last else pads
    mode = attributes.get("mode", b"constant").decode()
    if mode == "constant":
        fill = float(numpy.reshape(constant(node, given, 2, numpy.float32(0)), -1)[0])
        x = tf.pad(x, pads, constant_values=fill)
    elif mode == "reflect":
        x = tf.pad(x, pads, "REFLECT")
    else:
        for axis, (before, behind) in enumerate(pads):
            where = [slice(None)] * axis
            low, high = x[(*where, slice(0, 1))], x[(*where, slice(int(x.shape[axis]) - 1, None))]
            x = tf.concat([low] * before + [x] + [high] * behind, axis) if before or behind else x
    return Value(last=x) if value.native_last else Value(first=x)


def _reshaped(shape_of):
    def run(node, given, attributes):
        import tensorflow as tf

        value = given[0]
        shape = [int(size) for size in shape_of(node, given, attributes)]
        if not isinstance(value, Value):
            return value.reshape(shape)
        if value.native_last and len(value.shape) > 2 and all(size == 1 for size in value.shape[2:]):
            return Value(first=tf.reshape(value.last, shape))
        return Value(first=tf.reshape(value.first, shape))

    return run


def _of_reshape(node, given, attributes):
    wanted = [int(size) for size in constant(node, given, 1)]
    if not attributes.get("allowzero", 0):
        wanted = [given[0].shape[at] if size == 0 else size for at, size in enumerate(wanted)]
    return wanted


def _of_flatten(node, given, attributes):
    axis = attributes.get("axis", 1)
    shape = given[0].shape
    axis = axis + len(shape) if axis < 0 else axis
    return [int(numpy.prod(shape[:axis])), int(numpy.prod(shape[axis:]))]


def _of_squeeze(node, given, attributes):
    shape = list(given[0].shape)
    axes = constant(node, given, 1, attributes.get("axes", [at for at, size in enumerate(shape) if size == 1]))
    gone = {int(axis) % len(shape) for axis in axes}
    return [size for at, size in enumerate(shape) if at not in gone]


def _of_unsqueeze(node, given, attributes):
    shape = list(given[0].shape)
    axes = constant(node, given, 1, attributes.get("axes"))
    for axis in sorted(int(axis) % (len(shape) + len(axes)) for axis in axes):
        shape.insert(axis, 1)
    return shape


def _transposed(node, given, attributes):
    value, rank = given[0], len(given[0].shape)
    order = list(attributes.get("perm", range(rank)[::-1]))
    if not isinstance(value, Value):
        return value.transpose(order)
    if rank > 2 and order == to_last(rank):
        return Value(first=value.last)
    if rank > 2 and order == to_first(rank):
        return Value(last=value.first)
    if value.native_last:
        return Value(first=turned(value.last, [to_last(rank).index(axis) for axis in order]))
    return Value(first=turned(value.first, order))


def _reduced(name):
    def run(node, given, attributes):
        import tensorflow as tf

        value, rank = given[0], len(given[0].shape)
        reduce, keep = getattr(tf, name), bool(attributes.get("keepdims", 1))
        axes = [int(axis) % rank for axis in constant(node, given, 1, attributes.get("axes", range(rank)))]
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return value
        axes = axes or list(range(rank))
        if value.native_last and (keep or set(axes) >= set(range(2, rank))):
            found = reduce(value.last, [last_axis(axis, rank) for axis in axes], keepdims=keep)
            return Value(last=found) if keep else Value(first=found)
        return Value(first=reduce(value.first, axes, keepdims=keep))

    return run


def _largest(name):
    """Return a converter for ArgMax or ArgMin."""

    def run(node, given, attributes):
        import tensorflow as tf

        axis = attributes.get("axis", 0)
        found = getattr(tf, name)(given[0].first, axis, output_type=tf.int64)
        return Value(first=tf.expand_dims(found, axis) if attributes.get("keepdims", 1) else found)

    return run


def _expanded(node, given, attributes):
    import tensorflow as tf

    shape = numpy.broadcast_shapes(tuple(given[0].shape), tuple(int(size) for size in constant(node, given, 1)))
    if not isinstance(given[0], Value):
        return numpy.broadcast_to(given[0], shape)
    return Value(first=tf.broadcast_to(given[0].first, shape))


def _tiled(node, given, attributes):
    import tensorflow as tf

    return Value(first=tf.tile(given[0].first, [int(count) for count in constant(node, given, 1)]))


def _resized(node, given, attributes):
    import tensorflow as tf

    value = given[0]
    if len(value.shape) != 4:
        raise RefusedError("only pictures can be resized", node)
    sizes, scales = constant(node, given, 3), constant(node, given, 2)
    if node.op_type == "Upsample":
        sizes, scales = None, constant(node, given, 1)
    whole = list(sizes) if sizes is not None and len(sizes) else [
        int(numpy.floor(size * scale)) for size, scale in zip(value.shape, scales, strict=True)
    ]  # fmt: skip
    if [int(size) for size in whole[:2]] != value.shape[:2]:
        raise RefusedError("it changes other axes than those of space", node)
    new = [int(size) for size in whole[2:]]
    mode = attributes.get("mode", b"nearest").decode()
    how = attributes.get("coordinate_transformation_mode", b"half_pixel").decode()
    if node.op_type == "Upsample":
        how = "asymmetric"
    if mode == "linear":
        y = tf.raw_ops.ResizeBilinear(
            images=value.last, size=new, align_corners=how == "align_corners",
            half_pixel_centers=how in ("half_pixel", "pytorch_half_pixel"),
        )  # fmt: skip
        return Value(last=y)
    if mode != "nearest":
        raise RefusedError(f"mode {mode} is not known", node)
    rounding = attributes.get("nearest_mode", b"round_prefer_floor").decode()
    if how == "asymmetric" and (
        rounding == "floor" or all(n % o == 0 for n, o in zip(new, value.shape[2:], strict=True))
    ):
        return Value(last=tf.raw_ops.ResizeNearestNeighbor(images=value.last, size=new))
    x = value.last
    for axis, (old, size) in enumerate(zip(value.shape[2:], new, strict=True), start=1):
        x = tf.gather(x, _nearest(old, size, how, rounding), axis=axis)
    return Value(last=x)


def _nearest(old, new, how, rounding):
    """Return the source position of each new position."""
    at = numpy.arange(new, dtype=numpy.float64)
    if how == "align_corners":
        at = at * (old - 1) / max(1, new - 1)
    elif how == "asymmetric":
        at = at * old / new
    else:
        at = (at + 0.5) * old / new - 0.5
    found = {
        "floor": numpy.floor(at), "ceil": numpy.ceil(at), "round_prefer_floor": numpy.ceil(at - 0.5),
        "round_prefer_ceil": numpy.floor(at + 0.5),
    }[rounding]  # fmt: skip
    return numpy.clip(found, 0, old - 1).astype(numpy.int32)


def _deep_to_wide(node, given, attributes):
    import tensorflow as tf

    x, size = given[0].last, attributes["blocksize"]
    if attributes.get("mode", b"DCR") == b"CRD":
        channels = int(x.shape[-1])
        order = numpy.arange(channels).reshape(-1, size * size).T.reshape(-1)
        x = tf.gather(x, order.astype(numpy.int32), axis=-1)
    return Value(last=tf.nn.depth_to_space(x, size))


def _wide_to_deep(node, given, attributes):
    import tensorflow as tf

    return Value(last=tf.nn.space_to_depth(given[0].last, attributes["blocksize"]))


def _gathered_by_places(node, given, attributes):
    """Convert GatherND; a place below 0 counts from the end."""
    import tensorflow as tf

    value, places = (one.first if isinstance(one, Value) else one for one in given)
    together = attributes.get("batch_dims", 0)
    depth = int(given[1].shape[-1])
    sizes = numpy.array(given[0].shape[together : together + depth], numpy.int64)
    return Value(first=tf.gather_nd(value, tf.where(places < 0, places + sizes, places), batch_dims=together))


OPERATORS = {
    "ArgMax": _largest("argmax"), "ArgMin": _largest("argmin"), "Concat": _joined, "DepthToSpace": _deep_to_wide,
    "Expand": _expanded, "Flatten": _reshaped(_of_flatten), "GatherND": _gathered_by_places, "Pad": _pad,
    "ReduceMax": _reduced("reduce_max"),
    "ReduceMean": _reduced("reduce_mean"), "ReduceMin": _reduced("reduce_min"), "ReduceProd": _reduced("reduce_prod"),
    "ReduceSum": _reduced("reduce_sum"), "Reshape": _reshaped(_of_reshape), "Resize": _resized, "Slice": _cut,
    "SpaceToDepth": _wide_to_deep, "Split": _split, "Squeeze": _reshaped(_of_squeeze), "Tile": _tiled,
    "Transpose": _transposed, "Unsqueeze": _reshaped(_of_unsqueeze), "Upsample": _resized,
}  # fmt: skip

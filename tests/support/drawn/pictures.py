"""Operators on pictures (channels x height x width)."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.drawn.drawing import Drawing, Tensor


def _out(size: int, kernel: int, stride: int, pads: int, dilation: int = 1, ceil: bool = False) -> int:
    span = size + pads - (kernel - 1) * dilation - 1
    return (-(-span // stride) if ceil else span // stride) + 1


def convolution(d: Drawing, x: Tensor, channels: int = 0, kernel: int = 0, plain: bool = False) -> Tensor:
    """Of any group, stride, dilation and padding, with a bias or without."""
    c, h, w = x.shape
    kernel = kernel or int(d.pick([1, 3, 5], [4, 5, 1]))
    kernel = kernel if min(h, w) >= kernel else 1
    group = 1 if plain else d.pick([1, c, 2], [8, 2, 1])
    group = 1 if c % group else group
    channels = channels or (c if group == c > 1 else int(d.pick([4, 8, 12])) // group * group or group)
    stride = 1 if plain else d.pick([1, 2], [4, 1])
    dilation = d.pick([1, 2], [9, 1]) if kernel == 3 and min(h, w) >= 5 and not plain else 1
    weight = d.weight(channels, c // group, kernel, kernel, fan=c // group * kernel * kernel)
    inputs: list[Tensor | str] = [x, weight]
    if d.chance(0.7):
        inputs.append(d.bias(channels))
    attributes: dict[str, Any] = {"kernel_shape": [kernel, kernel], "strides": [stride, stride], "group": group}
    attributes["dilations"] = [dilation, dilation]
    span = (kernel - 1) * dilation
    how = d.pick(["same", "upper", "lower", "valid", "odd"], [6, 1, 0.3, 1, 0.5])
    if how in ("upper", "lower") and dilation == 1:
        attributes["auto_pad"] = f"SAME_{how.upper()}"
        return d.put("Conv", inputs, (channels, -(-h // stride), -(-w // stride)), **attributes)
    pads = {"valid": [0] * 4, "odd": [span, 0, 0, span]}.get(how, [span // 2] * 4)
    if min(h + pads[0] + pads[2], w + pads[1] + pads[3]) <= span:
        pads = [span // 2] * 4
    shape = tuple(_out(s, kernel, stride, pads[i] + pads[i + 2], dilation) for i, s in enumerate((h, w)))
    return d.put("Conv", inputs, (channels, *shape), pads=pads, **attributes)


def transposed_convolution(d: Drawing, x: Tensor) -> Tensor:
    """Twice as large, as decoders have it."""
    c, h, w = x.shape
    group = d.pick([1, c], [5, 1])
    channels = c if group == c else int(d.pick([4, 6]))
    kernel, pads, extra = d.pick([(2, 0, 0), (3, 1, 1), (4, 1, 0)])
    weight = d.weight(c, channels // group, kernel, kernel, fan=c // group * kernel)
    inputs: list[Tensor | str] = [x, weight]
    if d.chance(0.6):
        inputs.append(d.bias(channels))
    more = {"output_padding": [extra, extra]} if extra else {}
    return d.put(
        "ConvTranspose", inputs, (channels, 2 * h, 2 * w), kernel_shape=[kernel] * 2, strides=[2, 2], pads=[pads] * 4,
        group=group, **more,
    )  # fmt: skip


def normalized(d: Drawing, x: Tensor) -> Tensor:
    """BatchNormalization or InstanceNormalization."""
    c = x.shape[0]
    vectors = [d.constant(d.rng.uniform(0.5, 1.5, c).astype(np.float32)), d.bias(c)]
    if d.chance(0.15) and x.shape[1] * x.shape[2] > 4:
        return d.put("InstanceNormalization", [x, *vectors], x.shape, epsilon=1e-5)
    vectors += [d.bias(c), d.constant(d.rng.uniform(0.5, 2, c).astype(np.float32))]
    return d.put("BatchNormalization", [x, *vectors], x.shape, epsilon=1e-3, momentum=0.9)


def pooled(d: Drawing, x: Tensor) -> Tensor:
    """A maximum or an average over windows or over all."""
    c, h, w = x.shape
    operator = d.pick(["MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"], [5, 3, 1, 0.5])
    if operator.startswith("Global"):
        return d.put(operator, [x], (c, 1, 1))
    kernel = int(d.pick([2, 3], [1, 1]))
    if min(h, w) < 4:
        return d.put("MaxPool", [x], x.shape, kernel_shape=[3, 3], pads=[1] * 4, strides=[1, 1])
    stride, pad, ceil = int(d.pick([1, 2])), int(kernel == 3 and d.chance(0.6)), d.chance(0.15)
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2}
    if d.chance(0.1):
        attributes["auto_pad"] = "SAME_UPPER"
        return d.put(operator, [x], (c, -(-h // stride), -(-w // stride)), **attributes)
    if ceil:
        attributes["ceil_mode"] = 1
    if operator == "AveragePool" and pad and d.chance(0.5):
        attributes["count_include_pad"] = 1
    shape = tuple(_out(s, kernel, stride, 2 * pad, ceil=ceil) for s in (h, w))
    if ceil and any((size - 1) * stride >= s + pad for size, s in zip(shape, (h, w), strict=True)):
        del attributes["ceil_mode"]
        shape = tuple(_out(s, kernel, stride, 2 * pad) for s in (h, w))
    return d.put(operator, [x], (c, *shape), pads=[pad] * 4, **attributes)


def resized(d: Drawing, x: Tensor) -> Tensor:
    """Twice or half as large."""
    c, h, w = x.shape
    mode = d.pick(["nearest", "linear"], [3, 1])
    how = d.pick(["asymmetric", "half_pixel", "align_corners"], [3, 3, 1]) if mode == "linear" else "asymmetric"
    attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": how}
    if mode == "nearest":
        attributes["nearest_mode"] = "floor"
    if d.chance(0.5):
        sizes = d.constant(np.array([1.0, 1.0, 2.0, 2.0], np.float32))
        return d.put("Resize", [x, "", sizes], (c, 2 * h, 2 * w), **attributes)
    (shape,) = d.raw("Shape", [x.name])
    (batch,) = d.raw("Slice", [shape, d.constant(np.array([0])), d.constant(np.array([1]))])
    (sizes,) = d.raw("Concat", [batch, d.constant(np.array([c, 2 * h, 2 * w]))], axis=0)
    return d.put("Resize", [x, "", "", sizes], (c, 2 * h, 2 * w), **attributes)


def squeezed_and_excited(d: Drawing, x: Tensor) -> Tensor:
    """MobileNetV3's gate for each channel."""
    c = x.shape[0]
    mean = d.put("GlobalAveragePool", [x], (c, 1, 1))
    inner = d.put("Relu", [convolution(d, mean, 4, 1, plain=True)], (4, 1, 1))
    gate = convolution(d, inner, c, 1, plain=True)
    alpha = {"alpha": 0.2, "beta": 0.5} if d.chance(0.5) else {}
    return d.put("Mul", [x, d.put("HardSigmoid", [gate], gate.shape, **alpha)], x.shape)


def moved(d: Drawing, x: Tensor) -> Tensor:
    """Cut, padded, turned, picked from or laid out anew."""
    c, h, w = x.shape
    how = d.pick(["slice", "pad", "split", "turn", "depth", "gather", "flat", "expand"], [2, 2, 2, 1, 1, 1, 2, 0.5])
    if how == "slice" and h >= 4:
        step = d.pick([1, 2])
        numbers = [d.constant(np.array([one])) for one in (1, h, 2, step)]
        return d.put("Slice", [x, *numbers], (c, -(-(h - 1) // step), w))
    if how == "pad":
        mode = d.pick(["constant", "reflect", "edge"], [3, 1, 1]) if min(h, w) > 2 else "constant"
        pads = d.constant(
            np.array([0, 0, 1, 0, 0, 0, 1, 2]) if mode == "constant" else np.array([0, 0, 1, 1, 0, 0, 0, 1])
        )
        value = [d.constant(np.float32(d.pick([0.0, 0.3])))] if mode == "constant" and d.chance(0.5) else []
        return d.put(
            "Pad", [x, pads, *value], (c, h + 2, w + 2) if mode == "constant" else (c, h + 1, w + 2), mode=mode
        )
    if how == "split" and c % 2 == 0:
        sizes = [d.constant(np.array([c // 2, c // 2]))] if d.chance(0.5) else []
        left, right = d.raw("Split", [x.name, *sizes], 2, axis=1)
        d.tensors += [Tensor(left, (c // 2, h, w)), Tensor(right, (c // 2, h, w))]
        return d.tensors[-1]
    if how == "turn":
        (turned,) = d.raw("Transpose", [x.name], perm=[0, 2, 3, 1])
        (scaled,) = d.raw("Mul", [turned, d.constant(d.rng.uniform(0.5, 2, c).astype(np.float32))])
        return d.put("Transpose", [scaled], x.shape, perm=[0, 3, 1, 2])
    if how == "depth" and c % 4 == 0:
        return d.put("DepthToSpace", [x], (c // 4, 2 * h, 2 * w), blocksize=2, mode=d.pick(["DCR", "CRD"]))
    if how == "gather":
        return d.put("Gather", [x, d.constant(np.array([c - 1, 0, c // 2]))], (3, h, w), axis=1)
    if how in ("expand", "flat", "slice") and h == w == 1:
        (shape,) = d.raw("Shape", [x.name])
        (batch,) = d.raw("Gather", [shape, d.constant(np.array([0]))], axis=0)
        (wide,) = d.raw("Concat", [batch, d.constant(np.array([c, 4, 4]))], axis=0)
        return d.put("Expand", [x, wide], (c, 4, 4))
    return d.put("Reshape", [x, d.constant(np.array([0, c, -1]))], (c, h * w))


def flattened(d: Drawing, x: Tensor) -> Tensor:
    """A vector of it."""
    c, h, w = x.shape
    if h * w > 16 or d.chance(0.5):
        axes = {"axes": [2, 3], "keepdims": 0}
        operator = d.pick(["ReduceMean", "ReduceMax", "GlobalAveragePool"], [3, 1, 3])
        if operator.startswith("Reduce"):
            return d.put(operator, [x], (c,), **axes)
        mean = d.put(operator, [x], (c, 1, 1))
        if d.chance(0.5):
            return d.put("Squeeze", [mean, d.constant(np.array([2, 3]))], (c,))
        return d.put("Flatten", [mean], (c,), axis=1)
    return d.put("Flatten", [x], (c * h * w,))

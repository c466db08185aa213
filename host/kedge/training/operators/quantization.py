"""Quantization in training: rounding in the forward pass, straight-through gradients, and a trained step size.

The straight-through estimator follows Bengio, Léonard, Courville, "Estimating or propagating gradients through
stochastic neurons", 2013; the gradient of the step size and its scale 1/sqrt(N·Q) follow Esser et al., "Learned step
size quantization", ICLR 2020. ``Quant`` and ``BipolarQuant`` are defined by QONNX (Pappalardo et al., "QONNX:
representing arbitrary-precision quantized neural networks", 2022).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from kedge.training.operators.kernel import Call, Given, Table, Tensor, at, need

TABLE = Table()
QONNX = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")
"""Domains under which ``Quant`` has been defined."""


def rounded(x: Tensor, function: Callable[[Tensor], Tensor] = torch.round) -> Tensor:
    """Round values; the gradient passes as if they were not rounded."""
    return x + (function(x) - x).detach()


def stepped(scale: Tensor, count: int, highest: float) -> Tensor:
    """Return the step size unchanged, with its gradient scaled by 1/sqrt(count · highest)."""
    factor = 1.0 / math.sqrt(max(1.0, count * max(1.0, highest)))
    return scale * factor + (scale * (1 - factor)).detach()


def bounds(bits: float, *, signed: bool, narrow: bool) -> tuple[float, float]:
    """Return the smallest and the largest integer of a bit width."""
    if signed:
        return -(2.0 ** (bits - 1)) + (1 if narrow else 0), 2.0 ** (bits - 1) - 1
    return 0.0, 2.0**bits - (2 if narrow else 1)


def _away(x: Tensor) -> Tensor:
    return torch.sign(x) * torch.ceil(x.abs())


_ROUNDING: dict[str, Callable[[Tensor], Tensor]] = {
    "ROUND": torch.round,
    "HALF_EVEN": torch.round,
    "CEIL": torch.ceil,
    "FLOOR": torch.floor,
    "UP": _away,
    "DOWN": torch.trunc,
    "ROUND_TO_ZERO": torch.trunc,
    "HALF_UP": lambda x: torch.sign(x) * torch.floor(x.abs() + 0.5),
    "HALF_DOWN": lambda x: torch.sign(x) * torch.ceil(x.abs() - 0.5),
}


def _bipolar(x: Tensor, scale: Tensor) -> Tensor:
    """Reduce values to their signs; the gradient passes where a value is within one step (Hubara et al., "Binarized
    neural networks", 2016)."""
    scale = stepped(scale, x.numel() // max(1, scale.numel()), 1.0)
    inside = (x / scale).clamp(-1, 1)
    sign = torch.where(x / scale < 0, -1.0, 1.0).to(x.dtype)
    return (inside + (sign - inside).detach()) * scale


def quant(
    x: Tensor, scale: Tensor, zero: Tensor, bits: float, *, signed: bool, narrow: bool, rounding: str = "ROUND"
) -> Tensor:
    """Apply QONNX's ``Quant`` with gradients."""
    if bits == 1 and signed:
        return _bipolar(x + zero, scale)
    low, high = bounds(bits, signed=signed, narrow=narrow)
    scale = stepped(scale, x.numel() // max(1, scale.numel()), high)
    return (rounded((x / scale + zero).clamp(low, high), _ROUNDING[rounding]) - zero) * scale


@TABLE.add("Quant", domain=QONNX[0])
@TABLE.add("Quant", domain=QONNX[1])
@TABLE.add("Quant", domain=QONNX[2])
def _quant(call: Call, given: Given) -> Tensor:
    x, scale, zero, bits = (need(given, index) for index in range(4))
    if bits.numel() != 1:
        raise call.refuse("a bit width for each channel")
    rounding = str(call.get("rounding_mode", "ROUND")).upper()
    if rounding not in _ROUNDING:
        raise call.refuse(f"rounding_mode {rounding}")
    return quant(
        x,
        scale,
        zero,
        float(bits),
        signed=bool(call.get("signed", 1)),
        narrow=bool(call.get("narrow", 0)),
        rounding=rounding,
    )


@TABLE.add("BipolarQuant", domain=QONNX[0])
@TABLE.add("BipolarQuant", domain=QONNX[1])
@TABLE.add("BipolarQuant", domain=QONNX[2])
def _bipolar_quant(call: Call, given: Given) -> Tensor:
    return _bipolar(need(given, 0), need(given, 1))


_LIMITS: dict[torch.dtype, tuple[float, float]] = {
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
    torch.uint16: (0, 65535),
    torch.int16: (-32768, 32767),
}


def _along(call: Call, x: Tensor, values: Tensor) -> Tensor:
    """Reshape a scale or zero-point to lie along its axis of ``x``, or along the blocks of that axis."""
    if values.numel() == 1:
        return values.reshape(())
    axis = call.get("axis", 1) % x.ndim
    if block := call.get("block_size", 0):
        return values.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    return values.reshape([-1 if index == axis else 1 for index in range(x.ndim)])


@TABLE.add("QuantizeLinear")
def _quantize(call: Call, given: Given) -> Tensor:
    """Return the integers as floats, so that a gradient can pass."""
    x, scale, zero = need(given, 0), need(given, 1), at(given, 2)
    wanted = call.get("output_dtype", 0)
    kind = zero.dtype if zero is not None else {0: torch.uint8, 2: torch.uint8, 3: torch.int8}.get(wanted)
    if kind not in _LIMITS:
        raise call.refuse("a type of less or more than 8 or 16 bits")
    low, high = _LIMITS[kind]
    step = _along(call, x, stepped(scale, x.numel() // max(1, scale.numel()), high))
    offset = 0.0 if zero is None else _along(call, x, zero).to(x.dtype)
    return (rounded(x / step) + offset).clamp(low, high)


@TABLE.add("DequantizeLinear")
def _dequantize(call: Call, given: Given) -> Tensor:
    x, scale, zero = need(given, 0), need(given, 1), at(given, 2)
    step = _along(call, x, stepped(scale, x.numel() // max(1, scale.numel()), 127))
    numbers = x.to(scale.dtype)
    return (numbers if zero is None else numbers - _along(call, x, zero).to(scale.dtype)) * step

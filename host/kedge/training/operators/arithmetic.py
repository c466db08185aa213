"""Element-wise operators: arithmetic and activations."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from kedge.training.operators.kernel import Call, Given, Kernel, Table, Tensor, at, need

TABLE = Table()


def _unary(function: Callable[[Tensor], Tensor]) -> Kernel:
    return lambda call, given: function(need(given, 0))


_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}
for _name, _function in _UNARY.items():
    TABLE.put(_unary(_function), _name)


def _legacy(call: Call, a: Tensor, b: Tensor) -> Tensor:
    """Align the second operand with the first as before opset 7: from ``axis`` on, not from the end."""
    axis = call.get("axis")
    if call.opset >= 7 or axis is None:
        return b
    return b.reshape(*b.shape, *[1] * (a.ndim - int(axis) % a.ndim - b.ndim))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    def kernel(call: Call, given: Given) -> Tensor:
        a, b = need(given, 0), need(given, 1)
        return function(a, _legacy(call, a, b))

    return kernel


def _divided(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _power(a: Tensor, b: Tensor) -> Tensor:
    if b.is_floating_point() and not a.is_floating_point():
        return torch.pow(a.to(b.dtype), b).to(a.dtype)
    if b.numel() == 1:  # a plain number has the exact derivative where the base is zero or less
        exponent = b.reshape(-1)[0].item()
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return torch.pow(a, exponent).to(a.dtype).expand(shape)
    return torch.pow(a, b).to(a.dtype)


TABLE.put(_binary(torch.add), "Add")
TABLE.put(_binary(torch.sub), "Sub")
TABLE.put(_binary(torch.mul), "Mul")
TABLE.put(_binary(_divided), "Div")
TABLE.put(_binary(_power), "Pow")


@TABLE.add("Mod")
def _mod(call: Call, given: Given) -> Tensor:
    function = torch.fmod if call.get("fmod", 0) else torch.remainder
    return function(need(given, 0), need(given, 1))


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    return lambda call, given: functools.reduce(function, [need(given, index) for index in range(len(given))])


TABLE.put(_folded(torch.minimum), "Min")
TABLE.put(_folded(torch.maximum), "Max")
TABLE.put(_folded(torch.add), "Sum")


@TABLE.add("Mean")
def _mean(call: Call, given: Given) -> Tensor:
    return functools.reduce(torch.add, [need(given, index) for index in range(len(given))]) / len(given)


@TABLE.add("Clip")
def _clip(call: Call, given: Given) -> Tensor:
    x, low, high = need(given, 0), at(given, 1), at(given, 2)
    if call.opset < 11:
        return torch.clamp(x, call.get("min", -3.4028234663852886e38), call.get("max", 3.4028234663852886e38))
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@TABLE.add("LeakyRelu")
def _leaky(call: Call, given: Given) -> Tensor:
    return functional.leaky_relu(need(given, 0), call.get("alpha", 0.01))


@TABLE.add("PRelu")
def _prelu(call: Call, given: Given) -> Tensor:
    x, slope = need(given, 0), need(given, 1)
    if call.opset < 7 and slope.ndim == 1 and x.ndim > 1:
        slope = slope.reshape(-1, *[1] * (x.ndim - 2))
    return torch.where(x < 0, x * slope, x)


@TABLE.add("Elu")
def _elu(call: Call, given: Given) -> Tensor:
    return functional.elu(need(given, 0), call.get("alpha", 1.0))


@TABLE.add("Celu")
def _celu(call: Call, given: Given) -> Tensor:
    return functional.celu(need(given, 0), call.get("alpha", 1.0))


@TABLE.add("Selu")
def _selu(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * functional.elu(x, alpha)


@TABLE.add("ThresholdedRelu")
def _thresholded(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


@TABLE.add("HardSigmoid")
def _hard_sigmoid(call: Call, given: Given) -> Tensor:
    return (call.get("alpha", 0.2) * need(given, 0) + call.get("beta", 0.5)).clamp(0, 1)


@TABLE.add("Swish")
def _swish(call: Call, given: Given) -> Tensor:
    x = need(given, 0)
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@TABLE.add("Gelu")
def _gelu(call: Call, given: Given) -> Tensor:
    return functional.gelu(need(given, 0), approximate=call.get("approximate", "none"))


@TABLE.add("Shrink")
def _shrink(call: Call, given: Given) -> Tensor:
    x, bias, edge = need(given, 0), call.get("bias", 0.0), call.get("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@TABLE.add("Dropout")
def _dropout(call: Call, given: Given) -> Tensor | tuple[Tensor, ...]:
    # A frozen graph drops nothing; what regularizes training here is the held-back part.
    x = need(given, 0)
    training = at(given, 2)
    if training is not None and bool(training):
        raise call.refuse("training_mode")
    return x if call.outputs == 1 else (x, torch.ones_like(x, dtype=torch.bool))

"""Ranges before activations that answer the same below some number: steps are of use only where the answer changes.

As ``kedge_targets.graph.flat_activations`` has it for the backends whose integers Kedge writes itself."""

import math

_SHARE = 1 / 3
"""Of a step, that the answers below a range's begin may differ by."""


def _swish(x):
    return x / (1 + math.exp(-x))


_FLAT = {
    "GELU": lambda low: abs(0.5 * low * math.erfc(-low / math.sqrt(2))),
    "HARD_SWISH": lambda low: 0.0 if low <= -3 else math.inf,
    "ELU": math.exp,
}
"""Operator → how much its answers differ from the one at ``low``, below it."""
_LOWEST, _FIRST, _STEP = -16.0, -1.5, 0.125


def narrowed(wiring, ranges):
    """Tensor → (low, high), where that is narrower than what calibration saw.

    Args:
        wiring: of the float file.
        ranges: name of a tensor → (low, high) that calibration saw.
    """
    found = {}
    for tensor, readers in wiring.readers.items():
        seen = ranges.get(wiring.graph.tensors[tensor].name)
        difference = _difference(wiring, tensor, readers)
        if seen is None or difference is None or tensor in wiring.answers:
            continue
        low = _begin(difference, *seen)
        if low > seen[0]:
            found[tensor] = (low, seen[1])
    return found


def _begin(difference, least, most):
    """The highest begin below which the answer is as good as flat."""
    low = _FIRST
    while low > max(least, _LOWEST):
        if difference(low) <= _SHARE * (max(most, 0.0) - low) / 255:
            return low
        low -= _STEP
    return least


def _difference(wiring, tensor, readers):
    """Of the one activation that reads a tensor; None where there is none, or others read it too."""
    names = [wiring.names[at] for at in readers]
    if len(readers) == 1:
        return _FLAT.get(names[0])
    if sorted(names) != ["LOGISTIC", "MUL"]:
        return None
    gate, product = (readers[names.index(name)] for name in ("LOGISTIC", "MUL"))
    swish = sorted(wiring.inputs[product]) == sorted([tensor, wiring.outputs[gate][0]])
    return (lambda low: abs(_swish(low))) if swish else None

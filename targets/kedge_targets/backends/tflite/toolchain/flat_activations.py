"""Narrows ranges before activations that are flat below some value: steps are useful only where the output changes.

``kedge_targets.graph.flat_activations`` does the same for backends whose graphs Kedge quantizes itself."""

import math

_SHARE = 1 / 3
"""Share of a step by which the outputs below the start of a range may differ."""


def _swish(x):
    return x / (1 + math.exp(-x))


_FLAT = {
    "GELU": lambda low: abs(0.5 * low * math.erfc(-low / math.sqrt(2))),
    "HARD_SWISH": lambda low: 0.0 if low <= -3 else math.inf,
    "ELU": math.exp,
}
"""Operator → largest difference between its outputs below ``low`` and the one at ``low``."""
_LOWEST, _FIRST, _STEP = -16.0, -1.5, 0.125


def narrowed(wiring, ranges):
    """Return tensor → (low, high), if that is narrower than what calibration observed.

    Args:
        wiring: wiring of the float file.
        ranges: name of a tensor → (low, high) that calibration observed.
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
    """Return the highest start of the range below which the output is practically flat."""
    low = _FIRST
    while low > max(least, _LOWEST):
        if difference(low) <= _SHARE * (max(most, 0.0) - low) / 255:
            return low
        low -= _STEP
    return least


def _difference(wiring, tensor, readers):
    """Return the difference function of the only activation that reads a tensor, or None if there is none or others
    read it too."""
    names = [wiring.names[at] for at in readers]
    if len(readers) == 1:
        return _FLAT.get(names[0])
    if sorted(names) != ["LOGISTIC", "MUL"]:
        return None
    gate, product = (readers[names.index(name)] for name in ("LOGISTIC", "MUL"))
    swish = sorted(wiring.inputs[product]) == sorted([tensor, wiring.outputs[gate][0]])
    return (lambda low: abs(_swish(low))) if swish else None

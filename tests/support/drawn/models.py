"""Whole graphs: a stem, some operators one after the other, a few outputs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from tests.support.drawn import pictures, rows
from tests.support.drawn.drawing import Drawing, Graph, Tensor


def graph(seed: int) -> Graph:
    """The same for the same seed."""
    d = Drawing(seed)
    kind = d.pick(["picture", "sequence", "words", "vector"], [6, 2, 1, 2])
    if kind == "picture":
        x = pictures.convolution(d, d.input((int(d.pick([1, 3])), *d.pick([(8, 8), (12, 12), (9, 7)]))))
    elif kind == "sequence":
        x = rows.product(d, d.input((int(d.pick([4, 6])), 8)))
    elif kind == "words":
        x = rows.looked_up(d)
    else:
        x = rows.product(d, d.input((int(d.pick([8, 12])),)))
    if d.chance(0.1):
        _second_input(d, x)
    for _ in range(int(d.rng.integers(2, 12))):
        x = _step(d, d.latest(len(x.shape)) or x)
        if int(np.prod(x.shape)) > 4096:
            x = pictures.flattened(d, x) if len(x.shape) == 3 else rows.product(d, rows.moved(d, x))
    if d.chance(0.01):
        x = rows.branch(d, x)
    elif len(x.shape) < 3 and d.chance(0.5):
        x = rows.product(d, x)
    return d.finish()


def coverage(graphs: Iterable[Graph]) -> dict[str, set[str]]:
    """Operator → attributes that some of its nodes have."""
    found: dict[str, set[str]] = defaultdict(set)
    for one in graphs:
        for node in one.model.graph.node:
            found[node.op_type] |= {attribute.name for attribute in node.attribute}
    return found


def _second_input(d: Drawing, x: Tensor) -> None:
    other = d.input(x.shape)
    d.put(d.pick(["Add", "Mul"]), [x, other], x.shape)


def _step(d: Drawing, x: Tensor) -> Tensor:
    if d.chance(0.12) and (joined := _joined(d, x)) is not None:
        return joined
    if len(x.shape) == 3:
        return _of_pictures(d, x)
    if len(x.shape) == 2:
        of = [
            rows.product,
            rows.attention,
            rows.layer_norm,
            rows.activation,
            rows.recurrent,
            rows.convolution,
            rows.moved,
        ]
        step = d.pick(of, [5, 1.5, 1.5, 3, 0.4, 1, 1.5])
        made: Tensor = step(d, x)
        return made
    if d.chance(0.06) and x.shape[0] % 4 == 0:
        return d.put("Reshape", [x, d.constant(np.array([0, x.shape[0] // 4, 2, 2]))], (x.shape[0] // 4, 2, 2))
    if d.chance(0.06):
        return d.put("Unsqueeze", [x, d.constant(np.array([1]))], (1, *x.shape))
    return rows.product(d, x) if d.chance(0.55) else rows.activation(d, x)


def _of_pictures(d: Drawing, x: Tensor) -> Tensor:
    of = [
        pictures.convolution, pictures.transposed_convolution, pictures.normalized, pictures.pooled, pictures.resized,
        pictures.squeezed_and_excited, pictures.moved, pictures.flattened, rows.activation,
    ]  # fmt: skip
    large = min(x.shape[1:]) > 12
    step = d.pick(of, [8, 0 if large else 0.5, 1, 1.2, 0 if large else 0.8, 0.7, 1.5, 0.8, 5])
    made: Tensor = step(d, x)
    return made


def _joined(d: Drawing, x: Tensor) -> Tensor | None:
    """Two tensors put together: added, multiplied, subtracted, one behind the other, by a mean or a maximum."""
    alike = [one for one in d.tensors if one.shape == x.shape and one != x]
    if alike and d.chance(0.6):
        operator = d.pick(["Add", "Mul", "Sub", "Max", "Min", "Sum", "Concat"], [5, 2, 1, 0.5, 0.3, 0.3, 3])
        if operator == "Concat":
            return _concatenated(d, [x, d.pick(alike)])
        return d.put(operator, [x, d.pick(alike)], x.shape)
    fitting = [one for one in d.tensors if len(one.shape) == len(x.shape) and one.shape[1:] == x.shape[1:] and one != x]
    if fitting and len(x.shape) > 1:
        return _concatenated(d, [x, d.pick(fitting)])
    if d.chance(0.3):
        return d.put(
            "Div", [x, d.put("Add", [d.put("Abs", [x], x.shape), d.constant(np.float32(1))], x.shape)], x.shape
        )
    return d.put(d.pick(["Mul", "Add", "Div", "Sub"]), [x, d.constant(np.float32(d.pick([0.5, 3.0, 20.0])))], x.shape)


def _concatenated(d: Drawing, parts: list[Tensor]) -> Tensor:
    length = sum(one.shape[0] for one in parts)
    return d.put("Concat", parts, (length, *parts[0].shape[1:]), axis=1 if d.chance(0.6) else -len(parts[0].shape))

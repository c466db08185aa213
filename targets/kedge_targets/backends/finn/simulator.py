"""Executes a streamlined integer graph in numpy: bit for bit what the fabric computes, one batch at a time.

Every activation inside is an integer, so there is exactly one correct result, without rounding. Everything that can be
known when a model is loaded (ranges of all sums, lines for thresholds, memory) is computed then, once; a batch is a
list of numpy calls on preallocated arrays. Sums are computed in float32 if a bound on them proves that this is exact,
else in float64 (see :mod:`.matrices`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets.backends.finn import datatypes, elementwise, matrices, shapes, windows
from kedge_targets.backends.finn.context import Context, Operation, plain
from kedge_targets.backends.finn.graph_file import Graph
from kedge_targets.backends.finn.values import EXACT32, Space, Step, Value

Array = npt.NDArray[Any]

OPERATIONS: dict[str, Callable[[Context], Operation]] = {
    "MultiThreshold": elementwise.multi_threshold,
    "Add": elementwise.arithmetic,
    "Sub": elementwise.arithmetic,
    "Mul": elementwise.arithmetic,
    "Div": elementwise.arithmetic,
    "MatMul": matrices.matmul,
    "XnorPopcountMatMul": matrices.xnor_popcount,
    "Im2Col": windows.im2col,
    "MaxPool": windows.max_pool,
    "MaxPoolNHWC": windows.max_pool,
    "GlobalAveragePool": windows.global_average_pool,
    "QuantAvgPool2d": windows.quant_average_pool,
    "Pad": windows.pad,
    "Reshape": shapes.reshape,
    "Flatten": shapes.reshape,
    "Squeeze": shapes.reshape,
    "Unsqueeze": shapes.reshape,
    "Identity": shapes.reshape,
    "Transpose": shapes.transpose,
    "Concat": shapes.concatenate,
    "TopK": shapes.top_k,
}

LARGEST_BATCH = 256
_WORKING_BYTES = 1 << 20
"""Target size of the largest activation of a batch: what a processor's second-level cache holds."""
_PROGRAMS = 4
"""Number of batch sizes whose memory is kept."""


class Simulator:
    """A graph that is ready to run. Several threads may use it, one after the other.

    Args:
        graph: a graph with a batch of one; it runs with any batch.

    Raises:
        VerificationError: an operation is unknown, or its numbers are inconsistent; names the node.
    """

    def __init__(self, graph: Graph) -> None:
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self._values: dict[str, Value] = {}
        self._ranges: list[datatypes.Range | None] = []
        for name in graph.inputs:
            tensor = graph.tensors[name]
            found = datatypes.integers(tensor.datatype)
            self._ranges.append(found)
            self._values[name] = _given(tensor.shape[1:], found, name)
        self._operations: list[Operation] = []
        last_use: dict[str, int] = {}
        for number, node in enumerate(graph.nodes):
            make = OPERATIONS.get(node.operator)
            if make is None:
                raise VerificationError(
                    f"the simulator knows no {node.operator}",
                    where=f"node {node.name!r}",
                    remedy=f"It knows {', '.join(sorted(OPERATIONS))}",
                )
            self._operations.append(make(Context(graph, node, self._values)))
            last_use.update(dict.fromkeys(node.inputs, number))
        never = len(graph.nodes)
        self._last_use = {name: last_use.get(name, -1) for name in self._values}
        self._last_use.update(dict.fromkeys((*graph.outputs, *graph.inputs), never))
        largest = max(value.size for value in self._values.values())
        self.batch = max(1, min(LARGEST_BATCH, _WORKING_BYTES // largest))
        """Number of samples that are run at once; a larger batch is run in pieces."""
        self._programs: OrderedDict[int, _Program] = OrderedDict()
        self._alone = threading.Lock()

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        """Run a batch.

        Args:
            inputs: arrays in the order of :attr:`inputs`, batch first; any numeric dtype. An input of an integer type
                must hold integers of that type.

        Returns:
            Arrays in the order of :attr:`outputs`: float32 (integers in it are exact), indices int64; owned by the
                caller.

        Raises:
            InputError: an input does not take a shape, a NaN or a number.
        """
        count = self._checked(inputs)
        parts = []
        with self._alone:
            for start in range(0, count, self.batch):
                stop = min(count, start + self.batch)
                program = self._program(stop - start)
                parts.append(program.run([array[start:stop] for array in inputs]))
        if len(parts) == 1:
            return parts[0]
        return [np.concatenate(column) for column in zip(*parts, strict=True)]

    def value(self, name: str) -> Value:
        """Return what is known about an activation."""
        return self._values[name]

    def _checked(self, inputs: Sequence[Array]) -> int:
        if len(inputs) != len(self.inputs):
            raise InputError(f"{len(inputs)} inputs were given, the graph takes {len(self.inputs)}")
        count = len(inputs[0])
        for name, array, allowed in zip(self.inputs, inputs, self._ranges, strict=True):
            shape = self._values[name].shape
            if array.shape[1:] != shape or len(array) != count or not count:
                raise InputError(f"shape {array.shape} was given, it takes (batch, {shape})", where=f"input {name!r}")
            _require(array, allowed, name)
        return count

    def _program(self, batch: int) -> _Program:
        program = self._programs.get(batch)
        if program is None:
            program = self._programs[batch] = _Program(self, batch)
            while len(self._programs) > _PROGRAMS:
                self._programs.popitem(last=False)
        self._programs.move_to_end(batch)
        return program


class _Program:
    """The steps for one batch size."""

    def __init__(self, made_for: Simulator, batch: int) -> None:
        values = made_for._values
        space = Space(batch, values, made_for._last_use)
        self._inputs = [space.new(name) for name in made_for.inputs]
        for number, operation in enumerate(made_for._operations):
            space.begin(number)
            operation(space)
        space.begin(len(made_for._operations))
        self._outputs = [plain(space, name, values[name]) for name in made_for.outputs]
        self._steps: list[Step] = space.steps

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        for array, given in zip(self._inputs, inputs, strict=True):
            np.copyto(array, given, casting="unsafe")
        for step in self._steps:
            step()
        return [array.astype(np.float32) if array.dtype == np.float64 else array.copy() for array in self._outputs]


def _given(shape: tuple[int, ...], allowed: datatypes.Range | None, name: str) -> Value:
    if allowed is None:
        return Value(shape=shape, integer=False)
    if max(abs(allowed.low), abs(allowed.high)) >= EXACT32:
        raise VerificationError("its integers have more than 24 bits", where=f"input {name!r}")
    return Value(shape=shape, integer=True, low=allowed.low, high=allowed.high)


def _require(array: Array, allowed: datatypes.Range | None, name: str) -> None:
    """Raise :class:`InputError` if an input holds a value that its type does not have."""
    if array.dtype.kind == "f":
        low, high = array.min(), array.max()
        if np.isnan(low):
            raise InputError("holds NaN, a quantized model has no number for it", where=f"input {name!r}")
        if allowed is None:
            return
        if not np.array_equal(array, np.rint(array)):
            raise InputError("holds numbers that are no integers", where=f"input {name!r}")
    elif array.dtype.kind in "iub":
        if allowed is None:
            return
        if array.dtype.kind != "b":
            info = np.iinfo(array.dtype)
            if allowed.low <= info.min and info.max <= allowed.high:
                return
        low, high = array.min(), array.max()
    else:
        raise InputError(f"dtype {array.dtype} is not numeric", where=f"input {name!r}")
    if low < allowed.low or high > allowed.high:
        raise InputError(
            f"holds {low:g} .. {high:g}, its type holds {allowed.low} .. {allowed.high}", where=f"input {name!r}"
        )

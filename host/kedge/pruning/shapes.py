"""The shapes of all tensors of a graph, observed in two runs whose free axes differ.

An axis is fixed if its length is the same in both runs. If not, the pair of lengths shows what it is made of: a free
batch of 3 and of 11 merged with 4 heads is an axis of 12 and of 44. Shape inference alone fails on the shape arithmetic
that exporters write; the runtime does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning import inference_session
from kedge_protocol.errors import ModelError
from kedge_targets.graph import library

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Length = tuple[int, int]
"""Length of one axis in the first and in the second run."""

_PRIMES: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((3, 5, 7, 13), (11, 17, 19, 23)),
    ((2, 37, 41, 43), (3, 67, 71, 73)),
    ((2, 224, 224, 224), (3, 256, 256, 256)),
)
"""Lengths of free axes in each run, the batch first. If a graph refuses small ones (an image shrinks to nothing),
larger ones are tried."""
_SMALLEST = (2, 3)
"""Lengths of the batch alone, if the other axes are as long as a sample's."""
_MAX_SHAPE_VECTOR = 16

Example = Mapping[str, tuple[int, ...]]
"""Input → lengths of its axes that are known to work."""


@dataclass(frozen=True)
class Shapes:
    """The observed shapes of a graph.

    Attributes:
        lengths: tensor → axis → length in both runs; tensors that were not observed are missing.
        values: integer tensor of at most 16 numbers (shapes, indices) → its value in both runs.
        inputs: inputs of the first run; empty if nothing ran.
        varied: whether all free axes differed between the runs; if not, some that look fixed may be free.
    """

    lengths: Mapping[str, tuple[Length, ...]]
    values: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    inputs: Mapping[str, Array] = field(default_factory=dict)
    varied: bool = True

    def fixed(self, tensor: str, axis: int) -> int | None:
        """Return the length of an axis; None if it is free or unknown."""
        lengths = self.lengths.get(tensor)
        if lengths is None or not -len(lengths) <= axis < len(lengths):
            return None
        first, second = lengths[axis]
        return first if first == second and first > 0 else None


def observed(model: onnx.ModelProto, example: Example | None = None) -> Shapes:
    """Run the graph twice with made-up inputs. If it does not run, use shape inference alone, which tells nothing of
    free axes; then less can be pruned, but nothing breaks.

    Args:
        example: lengths for the free axes other than the batch if the graph refuses others: some exporters write the
            lengths of their own example into it.

    Raises:
        UnsupportedOperatorError, ModelError: ONNX Runtime does not load the graph.
    """
    names = [name for node in model.graph.node for name in node.output if name]
    inputs = list(model.graph.input)
    session = inference_session.session(model, where="the graph to prune", outputs=names)
    # Outputs that are no tensors cannot be seen, nor need they be.
    seen = [value.name for value in session.get_outputs() if value.type.startswith("tensor(")]
    attempts = [([_feeds(inputs, primes) for primes in pair], True) for pair in _PRIMES]
    if example is not None:
        attempts.append(([_feeds(inputs, (batch,), example) for batch in _SMALLEST], False))
    for pair, varied in attempts:
        try:
            first, second = (feeds | dict(zip(seen, session.run(seen, feeds), strict=True)) for feeds in pair)
        except Exception:  # noqa: BLE001 -- a runtime's errors have no common base; the next lengths may do
            continue
        return replace(_compared(first, second, model), inputs=pair[0], varied=varied)
    return _inferred(model)


def _feeds(
    inputs: Sequence[onnx.ValueInfoProto], primes: Sequence[int], example: Example | None = None
) -> dict[str, Array]:
    import onnx

    lengths: dict[str, int] = {}
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in inputs:
        shape = []
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value > 0:
                shape.append(dim.dim_value)
                continue
            if axis and example is not None:
                shape.append(example[value.name][axis])
                continue
            # The batch of all inputs is one, whatever they call it.
            symbol = "batch" if axis == 0 else dim.dim_param or f"{value.name}[{axis}]"
            if symbol not in lengths:
                rest = primes[1:]
                lengths[symbol] = primes[0] if axis == 0 else rest[(len(lengths) - ("batch" in lengths)) % len(rest)]
            shape.append(lengths[symbol])
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        # Ones are valid as indices, as masks and as truth.
        feeds[value.name] = (
            rng.standard_normal(shape).astype(dtype) if dtype.kind == "f" else np.ones(shape).astype(dtype)
        )
    return feeds


def _compared(first: Mapping[str, Array], second: Mapping[str, Array], model: onnx.ModelProto) -> Shapes:
    lengths: dict[str, tuple[Length, ...]] = {
        tensor.name: tuple((dim, dim) for dim in tensor.dims) for tensor in model.graph.initializer
    }
    values = {}
    for name, one in first.items():
        other = second[name]
        if one.ndim != other.ndim:
            continue
        lengths[name] = tuple(zip(one.shape, other.shape, strict=True))
        if one.dtype.kind == "i" and max(one.size, other.size) <= _MAX_SHAPE_VECTOR:
            values[name] = (one, other)
    return Shapes(lengths, values)


def _inferred(model: onnx.ModelProto) -> Shapes:
    from kedge_targets.graph import model_reader

    graph = model_reader.infer_shapes(model, where="the graph to prune").graph
    lengths: dict[str, tuple[Length, ...]] = {
        tensor.name: tuple((dim, dim) for dim in tensor.dims) for tensor in graph.initializer
    }
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            # A free axis of unknown make: no two are taken for the same.
            lengths[value.name] = tuple((dim.dim_value, dim.dim_value or -1) for dim in dims)
    return Shapes(lengths)


def product(lengths: Sequence[Length]) -> Length:
    """Return the product of lengths in each run."""
    return math.prod(one for one, _ in lengths), math.prod(other for _, other in lengths)


def check(seen: Shapes, pruned: onnx.ModelProto) -> None:
    """Check that a pruned graph loads, runs, and gives outputs of the same shapes as the original graph.

    Raises:
        UnsupportedOperatorError, ModelError: it does not, which is a bug in the pruning, not a fault of the model.
    """
    session = inference_session.session(pruned, where="the pruned graph")
    if not seen.inputs:
        return
    names = [value.name for value in pruned.graph.output]
    try:
        made = session.run(names, dict(seen.inputs))
    except Exception as error:
        raise ModelError(f"does not run: {library.reason_of(error)}", where="the pruned graph") from error
    for name, value in zip(names, made, strict=True):
        wanted = tuple(one for one, _ in seen.lengths[name])
        if np.shape(value) != wanted:
            raise ModelError(f"gives {name!r} as {np.shape(value)} instead of {wanted}", where="the pruned graph")

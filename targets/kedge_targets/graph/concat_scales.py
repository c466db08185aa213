"""Branches of unlike size that a Concat puts together for a convolution: one scale for all of them would leave the
small ones without steps. A factor is moved from the convolution that reads them into the one that makes them; in float
that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.contract import Calibration
from kedge_targets.graph import ranges
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_UNLIKE = 8.0
"""Ratio of largest values from which branches are balanced."""
_KEEP_FACTORS = frozenset({"Relu", "LeakyRelu"})


@dataclass(frozen=True)
class _Branch:
    """One input of a Concat.

    Attributes:
        tensor: its name.
        maker: the convolution before it.
        start, stop: its channels among all.
    """

    tensor: str
    maker: onnx.NodeProto
    start: int
    stop: int


def even_out(model: onnx.ModelProto, calibration: Calibration) -> onnx.ModelProto:
    """A copy in which branches that convolutions read through one Concat are of like size; the given model where there
    is nothing to even out. Factors are powers of two, which float multiplies by without error.

    Args:
        model: a float graph, shapes inferred.
        calibration: read once, where the graph has such a Concat.
    """
    import onnx

    found = _concats(model)
    if not found or not calibration.samples:
        return model
    wanted = list(dict.fromkeys(branch.tensor for _, branches in found for branch in branches))
    seen = ranges.observe(model, calibration, wanted)
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = {tensor.name: tensor for tensor in made.graph.initializer}
    changed = False
    for readers, branches in found:
        sizes = [max(abs(bound) for bound in seen[branch.tensor]) for branch in branches]
        for branch, size in zip(branches, sizes, strict=True):
            if size <= 0 or max(sizes) < _UNLIKE * size:
                continue
            factor = float(2.0 ** np.floor(np.log2(max(sizes) / size)))
            for name in branch.maker.input[1:]:
                _scale(stored[name], factor, slice(None))
            for reader in readers:
                _scale(stored[reader.input[1]], 1 / factor, slice(branch.start, branch.stop))
            changed = True
    return made if changed else model


def _scale(tensor: onnx.TensorProto, factor: float, columns: slice) -> None:
    from onnx import numpy_helper

    value = np.array(numpy_helper.to_array(tensor))
    place = (slice(None), columns) if columns != slice(None) else ...
    value[place] *= value.dtype.type(factor)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _concats(model: onnx.ModelProto) -> list[tuple[list[onnx.NodeProto], list[_Branch]]]:
    """Return the convolutions that read each Concat, and its branches, if all of them can absorb a factor."""
    wiring = Wiring(model)
    own = _of_one_node(model)
    found = []
    for node in model.graph.node:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        if node.op_type != "Concat" or axis != 1 or node.output[0] in wiring.outputs:
            continue
        readers = [reader for reader, _ in wiring.readers[node.output[0]]]
        if not readers or not all(_takes_factors(reader, own) for reader in readers):
            continue
        branches, start = [], 0
        for tensor in node.input:
            maker = _maker(tensor, wiring, own)
            if maker is None:
                break
            stop = start + own[maker.input[1]].dims[0]
            branches.append(_Branch(tensor, maker, start, stop))
            start = stop
        if len(branches) == len(node.input) and len({one.maker.name for one in branches}) == len(branches):
            found.append((readers, branches))
    return found


def _of_one_node(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Return the stored floats that exactly one node reads."""
    import onnx

    counts: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            counts[name] = counts.get(name, 0) + 1
    nested = Wiring(model).outputs
    return {
        tensor.name: tensor
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT and counts.get(tensor.name) == 1 and tensor.name not in nested
    }


def _takes_factors(node: onnx.NodeProto, own: Mapping[str, onnx.TensorProto]) -> bool:
    """Return whether a convolution's weights can be scaled along its input channels."""
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return node.op_type == "Conv" and groups == 1 and node.input[1] in own


def _maker(tensor: str, wiring: Wiring, own: Mapping[str, onnx.TensorProto]) -> onnx.NodeProto | None:
    """Return the convolution that produces a tensor for no other reader, directly or through operators that preserve
    factors."""
    while True:
        node = wiring.maker.get(tensor)
        if node is None or len(wiring.readers[tensor]) != 1 or tensor in wiring.outputs:
            return None
        if node.op_type == "Conv":
            return node if all(name in own for name in node.input[1:] if name) and len(node.input) > 1 else None
        if node.op_type not in _KEEP_FACTORS:
            return None
        tensor = node.input[0]

"""The output guard: checks each output of the integer model, and keeps layers in float if an output would be lost.

An output whose noise is above a hundredth of its power (20 dB) is not an answer any more, whatever the budget says of
the others. On calibration samples that is seen at once, and so is where the noise comes from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets import free_lengths
from kedge_targets.graph import batch, dead_code, library, opsets, qdq_insertion, ranges, rounding
from kedge_targets.graph.qdq_placement import CUTTING, MOVING, WEIGHTED, floats, place_quantizers
from kedge_targets.graph.wiring import Wiring
from kedge_targets.numerics import Granularity, QuantizationScheme
from kedge_targets.toolchain.driver_side.fewest import fewest

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

FLOOR_DB = 20.0
"""Signal-to-noise ratio, in dB, that every output needs."""
MARGIN_DB = 2.0
"""Extra dB for all samples together, since they are the calibration samples."""
SAMPLES, _MOST = 16, 128
_ELEMENTS = 1 << 22
"""Of all tensors together, up to which more than :data:`SAMPLES` are looked at. A branch that goes the other way on one
sample in thirty shows on many only."""
_TOGETHER = 4
"""Number of samples that are judged separately: others would hide a single bad answer."""
_NOTHING = 1e-3
"""Largest value in integers of an output that is always 0 in float."""
_BY_CHANNEL = 13
"""The opset from which on DequantizeLinear takes a scale for each channel."""

_RETURNS = 8
"""Trials to take nodes back into integers that are not needed in float."""


def few(model: onnx.ModelProto, calibration: Iterable[dict[str, Array]]) -> list[Feed]:
    """Return the first samples in the form that the graph takes: few of a large graph, more of a small one."""
    sizes = [
        math.prod(max(1, axis.dim_value) for axis in value.type.tensor_type.shape.dim[1:])
        for value in (*model.graph.input, *model.graph.value_info, *model.graph.output)
    ]
    count = min(max(SAMPLES, _ELEMENTS // max(1, sum(sizes))), _MOST)
    return list(batch.regroup(itertools.islice(calibration, count), batch.size(model)))


def weak(reference: Sequence[Mapping[str, Array]], answers: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return the outputs below :data:`FLOOR_DB` on some samples, or hardly above it on all, with their dB. Non-float
    outputs are not judged; one that is always 0 in float must be next to nothing."""
    found = {}
    for name in reference[0] if reference else ():
        whole = _decibels(name, reference, answers)
        if whole is None:
            if _always_zero(name, reference) and max(_largest(one[name]) for one in answers) > _NOTHING:
                found[name] = -math.inf
            continue
        starts = range(0, len(reference), _TOGETHER)
        parts = (_decibels(name, *(one[at : at + _TOGETHER] for one in (reference, answers))) for at in starts)
        least = min([whole - MARGIN_DB, *(part for part in parts if part is not None)])
        if least < FLOOR_DB:
            found[name] = least
    return found


def _always_zero(name: str, reference: Sequence[Mapping[str, Array]]) -> bool:
    return all(one[name].dtype.kind == "f" and not one[name].any() for one in reference)


def _largest(values: Array) -> float:
    return float(np.abs(values).max(initial=0.0))


def _decibels(
    name: str, reference: Sequence[Mapping[str, Array]], answers: Sequence[Mapping[str, Array]]
) -> float | None:
    wanted = np.concatenate([np.ravel(one[name]) for one in reference])
    if wanted.dtype.kind != "f" or not np.isfinite(wanted).all() or not wanted.any():
        return None
    made = [free_lengths.fitted(one[name], right[name]) for one, right in zip(answers, reference, strict=True)]
    if any(one.shape != right[name].shape for one, right in zip(made, reference, strict=True)):
        return -math.inf
    return rounding.sqnr_db(wanted, np.concatenate([np.ravel(one) for one in made]))


def answers(model: onnx.ModelProto, feeds: Sequence[Feed], tensors: Sequence[str]) -> list[dict[str, Array]]:
    """Compute these tensors for each feed without graph optimization, so that every processor gives the same."""
    import onnx

    onnxruntime = library.load()
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    have = {value.name for value in probe.graph.output}
    given = {value.name for value in probe.graph.input}
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in tensors if name not in have)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = library.opened(probe.SerializeToString(), settings, where="graph to be looked at")
    made = []
    for feed in feeds:
        fed = {name: feed[name] for name in given if name in feed}
        made.append(dict(zip(tensors, session.run(list(tensors), fed), strict=True)))
    return made


def apply_guard(
    model: onnx.ModelProto,
    feeds: Sequence[Feed],
    make: Callable[[Collection[str]], onnx.ModelProto],
) -> tuple[onnx.ModelProto, tuple[str, ...], dict[str, float]]:
    """Return the result of ``make`` with as many nodes in float as every output needs.

    Args:
        model: the float graph, with shapes inferred.
        feeds: of :func:`few`.
        make: names of nodes that are to stay in float → the graph with integers.

    Returns:
        The graph, the nodes that stay in float for it, and the outputs that were weak without, with their dB.
    """
    outputs = [value.name for value in model.graph.output]
    reference = answers(model, feeds, outputs)
    made = make(())
    first = weak(reference, answers(made, feeds, outputs))
    if not first:
        return made, (), first

    def tried(kept: Sequence[str]) -> tuple[onnx.ModelProto, bool]:
        other = make(kept)
        return other, not weak(reference, answers(other, feeds, outputs))

    order = noisiest(model, made, feeds, list(first))
    made, kept = fewest(order, tried, along=[node.name for node in model.graph.node], returns=_RETURNS)
    return made, kept, first


def simulated(model: onnx.ModelProto, calibration: Iterable[dict[str, Array]]) -> onnx.ModelProto:
    """Simulate the graph with 8-bit integers, for backends whose files do not expose intermediate tensors."""
    model = opsets.raise_opset(model, _BY_CHANNEL, where="graph to be looked at")
    operators = WEIGHTED | MOVING | CUTTING | {"Add", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"}
    where = place_quantizers(model, operators, ())
    found = ranges.observe(model, calibration, qdq_insertion.tensors_to_observe(model, where))
    how = QuantizationScheme(
        activation="uint8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_CHANNEL
    )
    return qdq_insertion.insert_qdq(model, where, found, qdq_insertion.QdqForm(how=how))


def note(kept: Sequence[str], weak_outputs: Mapping[str, float]) -> str:
    """Return a note on the nodes kept in float."""
    worst = min(weak_outputs, key=lambda name: weak_outputs[name])
    listed = ", ".join(kept[:5]) + (", ..." if len(kept) > 5 else "")
    return (
        f"{len(kept)} nodes stay in float ({listed}): in integers output {worst!r} would have "
        f"{weak_outputs[worst]:.0f} dB of signal to noise, {FLOOR_DB:.0f} are the least"
    )


def noisiest(model: onnx.ModelProto, made: onnx.ModelProto, feeds: Sequence[Feed], outputs: Sequence[str]) -> list[str]:
    """Return the names of the nodes before these outputs, by the noise that each adds, noisiest first.

    Args:
        made: the same graph with integers; tensors that it has not are passed over.
    """
    wiring = Wiring(model)
    there = {tensor for node in made.graph.node for tensor in node.output}
    known = floats(model)
    behind = {node.name for name in outputs for node in wiring.behind(name)}
    nodes = [node for node in model.graph.node if node.name in behind]
    tensors = [tensor for node in nodes for tensor in node.output if tensor in there and tensor in known]
    before, after = answers(model, feeds, tensors), answers(made, feeds, tensors)
    noise: dict[str, float] = {}
    added: dict[str, float] = {}
    for node in nodes:
        given = max((noise.get(name, 0.0) for name in dead_code.inputs_of(node)), default=0.0)
        own = max((_relative(name, before, after) for name in node.output if name in tensors), default=given)
        noise |= dict.fromkeys(node.output, own)
        added[node.name] = own - given if np.isfinite(given) else 0.0
    return sorted(added, key=lambda name: -added[name])


def _relative(name: str, before: Sequence[Mapping[str, Array]], after: Sequence[Mapping[str, Array]]) -> float:
    """Return the noise-to-signal ratio."""
    wanted = np.concatenate([np.ravel(one[name]) for one in before]).astype(np.float64)
    difference = np.concatenate([np.ravel(one[name]) for one in after]) - wanted
    power = float(wanted @ wanted)
    with np.errstate(all="ignore"):
        found = float(difference @ difference) / power if power > 0 else np.inf if difference.any() else 0.0
    return found if np.isfinite(found) else float("inf")

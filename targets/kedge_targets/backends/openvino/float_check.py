"""Compares OpenVINO's reading of a float graph with ONNX Runtime: some operators are computed otherwise without a word
(in 2026.4 a Resize with ``antialias``, for one), and no figure of an integer model would tell why."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_protocol import digest
from kedge_protocol.errors import UnsupportedOperatorError
from kedge_targets.backends.openvino import reading
from kedge_targets.contract import Array, Calibration
from kedge_targets.graph import batch, nodes, output_guard, qdq_placement, rounding

if TYPE_CHECKING:
    import onnx

_ALIKE_DB = 30.0
"""Signal to noise of two float runtimes; it is above 60 but where a rounding error turns a comparison."""
_NOTHING = 1e-5
"""A largest error below which an output is right however small its values are."""
_SAMPLES = 2
_HELD, _TOGETHER = 16, 4
"""Samples on which a quantized file is compared, and how many of them in one call where the batch is free."""
_DRAWN = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)

_found_right: set[str] = set()
"""Graphs that this process has compared: a search lowers the same one many times."""


def check(openvino: Any, model: Any, graph: onnx.ModelProto, calibration: Calibration) -> None:
    """Compare each float output on a few calibration samples.

    Args:
        model: what OpenVINO read.
        graph: what it was read from.

    Raises:
        UnsupportedOperatorError: names the first node whose output differs, or the one that cannot run.
    """
    key = digest.of_bytes(graph.SerializeToString())
    drawn = any(node.operator in _DRAWN for node in nodes.nodes(graph))
    if key in _found_right or drawn or not calibration.samples:
        return
    feeds = _feeds(graph, calibration)
    if not all(value.name in feeds[0] for value in graph.graph.input):
        return
    outputs = [value.name for value in graph.graph.output]
    reference = output_guard.answers(graph, feeds, outputs)
    if wrong := _wrong(reference, _answers(reading.compiled(openvino, model, graph), feeds), outputs):
        node, decibels = _first(openvino, graph, feeds) or (None, wrong[1])
        said = f"operator {node.op_type!r}" if node is not None else "the graph"
        raise UnsupportedOperatorError(
            f"OpenVINO does not compute {said} as ONNX Runtime does: {decibels:.0f} dB of signal to noise in float",
            where=f"node {node.name!r}" if node is not None else f"output {wrong[0]!r}",
            remedy="Export the model with another operator in its place, or choose a target with another backend",
        )
    _found_right.add(key)


def holds(openvino: Any, model: Any, graph: onnx.ModelProto, calibration: Calibration) -> bool:
    """Return whether a quantized graph has its answers in OpenVINO, too: the plugin (2026.4) saturates on processors
    without VNNI, and computes some operators on integers wrongly, often from the second sample of a batch on.

    Args:
        model, graph: see :func:`check`.
    """
    samples = list(itertools.islice(calibration, _HELD))
    if not samples or not all(value.name in samples[0] for value in graph.graph.input):
        return True
    feeds = list(batch.regroup(samples, batch.size(graph) or _at_once(graph, samples, _TOGETHER)))
    reference = output_guard.answers(graph, feeds, [value.name for value in graph.graph.output])
    return not output_guard.weak(reference, _answers(reading.compiled(openvino, model, graph), feeds))


def _feeds(graph: onnx.ModelProto, calibration: Calibration) -> list[dict[str, Array]]:
    size = batch.size(graph)
    samples = list(itertools.islice(calibration, max(_SAMPLES, size or 1)))
    return list(batch.regroup(samples, size or _at_once(graph, samples, _SAMPLES)))


def _at_once(graph: onnx.ModelProto, samples: Sequence[dict[str, Array]], most: int) -> int | None:
    """Return how many samples one call takes where the batch is free: an axis of one hides what is wrong along it."""
    alike = len({tuple(np.shape(array) for array in sample.values()) for sample in samples}) == 1
    shapes = [value.type.tensor_type.shape.dim for value in graph.graph.input]
    return most if alike and all(shape and not shape[0].HasField("dim_value") for shape in shapes) else None


def _answers(compiled: Any, feeds: Sequence[dict[str, Array]]) -> list[dict[str, Array]]:
    made = []
    for feed in feeds:
        # An input has the names of what only casts it, too.
        found = compiled({port: feed[name] for port in compiled.inputs for name in port.get_names() if name in feed})
        made.append({name: np.asarray(found[port]) for port in compiled.outputs for name in port.get_names()})
    return made


def _joins_samples(wanted: tuple[int, ...], got: tuple[int, ...]) -> bool:
    """Return whether an answer lost axes, or has one row where each sample should have its own."""
    return len(wanted) != len(got) or (got[:1] == (1,) and wanted[:1] != got[:1])


def _wrong(
    reference: Sequence[dict[str, Array]], answers: Sequence[dict[str, Array]], tensors: Sequence[str]
) -> tuple[str, float] | None:
    """Return the first tensor that differs, with its dB."""
    for name in tensors:
        both = zip(reference, answers, strict=True)
        pairs = [(wanted[name], got[name]) for wanted, got in both if name in got]
        if any(_joins_samples(wanted.shape, got.shape) for wanted, got in pairs):
            return name, -np.inf
        # Answers of free lengths, as the boxes that are left of many, may differ by one.
        pairs = [(wanted, got) for wanted, got in pairs if wanted.shape == got.shape]
        if not pairs or pairs[0][0].dtype.kind != "f":
            continue
        wanted, got = (np.concatenate([np.ravel(pair[side]) for pair in pairs]) for side in (0, 1))
        if not np.isfinite(wanted).all() or np.abs(wanted - got).max(initial=0.0) < _NOTHING:
            continue
        if (found := rounding.sqnr_db(wanted, got)) < _ALIKE_DB:
            return name, found
    return None


def _first(
    openvino: Any, graph: onnx.ModelProto, feeds: Sequence[dict[str, Array]]
) -> tuple[onnx.NodeProto, float] | None:
    """Return the first node whose output differs, with its dB; None where the graph with all tensors as outputs, which
    fewer passes rewrite, is right."""
    import onnx

    probe = onnx.ModelProto()
    probe.CopyFrom(graph)
    known = {value.name: value for value in graph.graph.value_info}
    tensors = list(_in_order(graph, qdq_placement.floats(graph)))
    have = {value.name for value in graph.graph.output}
    probe.graph.output.extend(known[name] for _, name in tensors if name not in have and name in known)
    there = [name for _, name in tensors if name in have or name in known]
    reference = output_guard.answers(graph, feeds, there)
    compiled = reading.compiled(openvino, openvino.Core().read_model(probe.SerializeToString()), graph)
    found = _wrong(reference, _answers(compiled, feeds), there)
    if found is None:
        return None
    return next(node for node, name in tensors if name == found[0]), found[1]


def _in_order(graph: onnx.ModelProto, floats: set[str]) -> Iterator[tuple[onnx.NodeProto, str]]:
    return ((node, name) for node in graph.graph.node for name in node.output if name in floats)

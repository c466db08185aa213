"""Partitions a graph around some of its nodes, so that only the part after one of them needs to run again.

Each cut node becomes its own session, which takes its weight as an input; each part in between becomes one session. So
a layer's input or weight can be changed and the outputs recomputed from there, without making a session, copying a
weight, or computing anything before the layer again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError
from kedge_targets.graph import dead_code, library
from kedge_targets.graph.layers import Layer

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Tensors = dict[str, Array]

_MAX_THREADS = 4


@dataclass(kw_only=True)
class _Subgraph:
    """A group of nodes that run together.

    Attributes:
        weight: name of the constant that is passed as an input.
        inputs: names of the inputs that change from call to call, without the weight.
        outputs: names of the outputs that a later subgraph or the graph's caller reads.
    """

    nodes: list[onnx.NodeProto]
    weight: str | None
    inputs: list[str]
    outputs: list[str]
    session: Any = None


class GraphPartition:
    """A graph divided into subgraphs.

    Args:
        model: the graph with constants folded and named nodes; not changed.
        layers: the layers at which it is cut.
        weights: of these layers; tensor name → array.

    Raises:
        ModelError: ONNX Runtime rejects a subgraph or fails in it.
    """

    def __init__(self, model: onnx.ModelProto, layers: Sequence[Layer], weights: Mapping[str, Array]) -> None:
        self._model = model
        self._weights = weights
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        # An output that folding has made a constant changes with no layer.
        self.outputs = [value.name for value in model.graph.output if value.name not in self._constants]
        self._partition = self._cut({layer.name: layer for layer in layers})
        self._place = {
            segment.nodes[0].name: index for index, segment in enumerate(self._partition) if len(segment.nodes) == 1
        }

    def run(self, feeds: Mapping[str, Array]) -> Tensors:
        """Run the whole graph; return every tensor between the subgraphs, the inputs and the outputs."""
        made = {name: np.asarray(array) for name, array in feeds.items()}
        for segment in self._partition:
            self._step(segment, made, {})
        return made

    def changed(self, layer: Layer, clean: Mapping[str, Array], changes: Mapping[str, Array], *, half: bool) -> Tensors:
        """Return the outputs after one layer's inputs are replaced.

        Args:
            clean: tensors from :meth:`run`; not changed.
            changes: tensor name → array, for the layer's inputs or its weight; other readers see the clean ones.
            half: whether the layer's output is rounded to float16.
        """
        place = self._place[layer.name]
        segment = self._partition[place]
        made = dict(clean)
        before = {name: clean[name] for name in changes if name in clean}
        made.update({name: array for name, array in changes.items() if name in clean})
        self._step(segment, made, changes)
        made.update(before)
        dirty = set(segment.outputs)
        for name in segment.outputs if half else ():
            made[name] = rounded_to_half(made[name])
        for later in self._partition[place + 1 :]:
            if not dirty.isdisjoint(later.inputs):
                self._step(later, made, {})
                dirty.update(later.outputs)
        return {name: made[name] for name in self.outputs}

    def _step(self, segment: _Subgraph, made: Tensors, changes: Mapping[str, Array]) -> None:
        feeds = {name: made[name] for name in segment.inputs}
        if segment.weight is not None:
            feeds[segment.weight] = changes.get(segment.weight, self._weights[segment.weight])
        if segment.session is None:
            segment.session = self._opened(segment, feeds)
        try:
            values = segment.session.run(segment.outputs, feeds)
        except Exception as error:  # the runtime's errors have no common base but Exception
            raise ModelError(
                f"ONNX Runtime fails in it: {library.reason_of(error)}", where=f"node {segment.nodes[0].name!r}"
            ) from error
        made.update(zip(segment.outputs, values, strict=True))

    def _cut(self, layers: Mapping[str, Layer]) -> list[_Subgraph]:
        pieces: list[tuple[list[onnx.NodeProto], str | None]] = []
        between: list[onnx.NodeProto] = []
        for node in self._model.graph.node:
            if node.name not in layers:
                between.append(node)
                continue
            if between:
                pieces.append((between, None))
                between = []
            pieces.append(([node], layers[node.name].weight))
        if between:
            pieces.append((between, None))
        partition: list[_Subgraph] = []
        needed = set(self.outputs)
        for nodes, weight in reversed(pieces):
            made = [tensor for node in nodes for tensor in node.output if tensor]
            taken = {tensor for node in nodes for tensor in dead_code.inputs_of(node)}
            taken -= set(made) | set(self._constants)
            outputs = [tensor for tensor in made if tensor in needed]
            needed |= taken
            if outputs:
                partition.append(_Subgraph(nodes=nodes, weight=weight, inputs=sorted(taken), outputs=outputs))
        return partition[::-1]

    def _opened(self, segment: _Subgraph, feeds: Mapping[str, Array]) -> Any:
        import onnx

        read = {tensor for node in segment.nodes for tensor in dead_code.inputs_of(node)} - {segment.weight}
        graph = onnx.helper.make_graph(
            segment.nodes,
            "segment",
            [_info(name, array) for name, array in feeds.items()],
            [onnx.helper.make_empty_tensor_value_info(name) for name in segment.outputs],
            [tensor for name, tensor in self._constants.items() if name in read],
        )
        made = onnx.helper.make_model(graph, opset_imports=list(self._model.opset_import))
        made.functions.extend(self._model.functions)
        made.ir_version = self._model.ir_version
        settings = library.load().SessionOptions()
        settings.log_severity_level = 4
        settings.intra_op_num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        # There are many sessions, and all but one always wait.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.enable_cpu_mem_arena = False
        return library.opened(made.SerializeToString(), settings, where=f"node {segment.nodes[0].name!r}")


def rounded_to_half(array: Array) -> Array:
    """Round each number to the nearest float16, as float32; other types are returned unchanged."""
    if array.dtype != np.float32:
        return array
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float32)


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    import onnx

    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [f"{name}_{axis}" for axis in range(array.ndim)])

"""Cuts channels out of a graph: shrinks the weights and adapts the constants in the graph that give their lengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning import constant_folding, shape_constants, shapes
from kedge.pruning.groups import Group, Structure
from kedge.pruning.rule_scope import Scope, integers
from kedge.pruning.shape_constants import Entry

if TYPE_CHECKING:
    import onnx

Alive = npt.NDArray[np.bool_]


def cut(structure: Structure, removed: Iterable[tuple[Group, Iterable[int]]]) -> onnx.ModelProto:
    """Return the graph without some channels, checked by running it.

    Args:
        removed: groups, each with the indices of its channels to remove.

    Raises:
        ModelError: the resulting graph does not run, which is a bug in this module.
    """
    import onnx

    from kedge_targets.graph import model_reader

    model = onnx.ModelProto()
    model.CopyFrom(structure.model)
    _Surgeon(structure.scope, structure.alive(removed), model).operate()
    _drop_dead(model)
    constant_folding.drop_unread(model)
    del model.graph.value_info[:]
    model = model_reader.infer_shapes(model, where="the pruned graph")
    shapes.check(structure.scope.shapes, model)
    return model


class _Surgeon:
    """A cut of a graph, made in place."""

    def __init__(self, scope: Scope, alive: Alive, model: onnx.ModelProto) -> None:
        self._scope = scope
        self._alive = alive
        self._model = model
        self._names = {tensor.name for tensor in model.graph.initializer}

    def operate(self) -> None:
        for tensor in self._model.graph.initializer:
            self._shorten(tensor)
        made: list[onnx.NodeProto] = []
        for node in self._model.graph.node:
            changed = [self._changed(name) for name in node.output]
            if any(changed):
                if node.op_type in ("Reshape", "Expand"):
                    made += self._retarget(node)
                elif node.op_type == "Split":
                    self._resize_parts(node)
                elif node.op_type == "Slice":
                    self._move_bounds(node)
            if node.op_type == "Conv":
                self._regroup(node)
            made.append(node)
        nodes = [type(node).FromString(node.SerializeToString()) for node in made]
        del self._model.graph.node[:]
        self._model.graph.node.extend(nodes)

    def _shorten(self, tensor: onnx.TensorProto) -> None:
        from onnx import numpy_helper

        value: Any = None
        for axis, ids in enumerate(self._scope.axes.get(tensor.name, ())):
            if ids is not None and not self._alive[ids].all():
                value = numpy_helper.to_array(tensor) if value is None else value
                value = np.compress(self._alive[ids], value, axis=axis)
        if value is not None:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), tensor.name))

    def _changed(self, name: str) -> bool:
        return any(ids is not None and not self._alive[ids].all() for ids in self._scope.axes.get(name, ()))

    def _length(self, name: str, axis: int) -> int:
        ids = self._scope.of(name)[axis]
        return self._scope.lengths(name)[axis][0] if ids is None else int(self._alive[ids].sum())

    def _constant(self, node: onnx.NodeProto, what: str, values: Iterable[int]) -> str:
        """Add a constant of integers; return its name."""
        from onnx import numpy_helper

        name, count = f"{node.name}_{what}", 1
        while name in self._names:
            count += 1
            name = f"{node.name}_{what}_{count}"
        self._names.add(name)
        self._model.graph.initializer.append(numpy_helper.from_array(np.array(list(values), dtype=np.int64), name))
        return name

    def _retarget(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Rewrite the target of a Reshape or Expand; return the nodes that must be inserted before it."""
        from onnx import helper

        axes = self._scope.of(node.output[0])
        entries = shape_constants.entries(self._scope, node, axes) or []
        numbers = {Entry.COPY: 0, Entry.REST: -1, Entry.KEEP: 1, Entry.GIVEN: 0}
        values = [
            self._length(node.output[0], axis) if entry is Entry.LENGTH else numbers[entry]
            for axis, entry in enumerate(entries)
        ]
        kept = [attribute for attribute in node.attribute if attribute.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
        if Entry.GIVEN not in entries:
            node.input[1] = self._constant(node, "target", values)
            return []
        before, parts = [], []
        for axis, (entry, value) in enumerate(zip(entries, values, strict=True)):
            if entry is not Entry.GIVEN:
                parts.append(self._constant(node, f"target_{axis}", [value]))
                continue
            name = f"{node.name}_given_{axis}"
            index = self._constant(node, f"place_{axis}", [axis])
            before.append(helper.make_node("Gather", [node.input[1], index], [name], name=name, axis=0))
            parts.append(name)
        whole = f"{node.name}_new_target"
        before.append(helper.make_node("Concat", parts, [whole], name=whole, axis=0))
        node.input[1] = whole
        return before

    def _resize_parts(self, node: onnx.NodeProto) -> None:
        from onnx import helper

        axis = next((a.i for a in node.attribute if a.name == "axis"), 0) % self._scope.rank(node.input[0])
        parts = [self._length(name, axis) for name in node.output]
        old = [attribute for attribute in node.attribute if attribute.name == "split"]
        kept = [attribute for attribute in node.attribute if attribute.name not in ("split", "num_outputs")]
        del node.attribute[:]
        node.attribute.extend(kept)
        version = next(opset.version for opset in self._model.opset_import if opset.domain in ("", "ai.onnx"))
        if old or version < 13:
            node.attribute.append(helper.make_attribute("split", parts))
            return
        del node.input[1:]
        node.input.append(self._constant(node, "parts", parts))

    def _move_bounds(self, node: onnx.NodeProto) -> None:
        from onnx import helper

        cuts = shape_constants.sliced(self._scope, node) or {}
        old = {
            "starts": self._present(node, "starts", 1),
            "ends": self._present(node, "ends", 2),
        }
        for place, (axis, (start, stop, step)) in enumerate(cuts.items()):
            ids = self._scope.of(node.input[0])[axis]
            if ids is None or step != 1 or len(ids) != self._scope.shapes.fixed(node.input[0], axis):
                continue
            old["starts"][place] = int(self._alive[ids[:start]].sum())
            old["ends"][place] = int(self._alive[ids[:stop]].sum())
        if len(node.input) > 1:
            node.input[1] = self._constant(node, "starts", old["starts"])
            node.input[2] = self._constant(node, "ends", old["ends"])
            for index in (3, 4):
                # All four are of one type.
                if index < len(node.input) and node.input[index]:
                    values = integers(self._scope.constant(node, index)) or []
                    node.input[index] = self._constant(node, f"bounds_{index}", values)
            return
        kept = [attribute for attribute in node.attribute if attribute.name not in old]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(name, values) for name, values in old.items())

    def _present(self, node: onnx.NodeProto, name: str, index: int) -> list[int]:
        if len(node.input) > 1:
            return integers(self._scope.constant(node, index)) or []
        return [int(value) for a in node.attribute if a.name == name for value in a.ints]

    def _regroup(self, node: onnx.NodeProto) -> None:
        data, weight = node.input[0], node.input[1]
        for attribute in node.attribute:
            if attribute.name == "group" and attribute.i > 1 and self._scope.of(data)[1] is not None:
                attribute.i = self._length(data, 1) // self._length(weight, 1)


def _drop_dead(model: onnx.ModelProto) -> None:
    """Remove the nodes whose outputs nothing reads any more."""
    from kedge_targets.graph import nodes

    graph = model.graph
    answers = {value.name for value in graph.output}
    while True:
        read = {name for inner in nodes.graphs(graph) for node in inner.node for name in node.input} | answers
        read |= {value.name for inner in nodes.graphs(graph) for value in inner.output}
        dead = [node for node in graph.node if not read.intersection(filter(None, node.output))]
        if not dead:
            return
        for node in dead:
            graph.node.remove(node)

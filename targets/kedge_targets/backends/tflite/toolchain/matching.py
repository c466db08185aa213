"""Finds the operators of a float ``.tflite`` that do the work of given nodes of its ONNX graph.

Converters do not keep names, and they fuse and split nodes; so both are run on the same sample, and tensors that hold
the same numbers, in any order of axes, are the same tensor.
"""

import flatbuffer
import numpy

_NEAR = 1e-3  # of a tensor's root mean square
_FAR = 3e-2  # the same, behind many layers of other kernels: if it is the nearest, and by far
_CLEARLY = 8  # times as far is everything else then


class Matching:
    """The two graphs, matched tensor by tensor.

    Args:
        graph: the ONNX model.
        feed: its inputs, by name.
        content: the float file.
        given: the same inputs in the file's order and layout.
    """

    def __init__(self, graph, feed, content, given):
        self.graph = graph
        self._wiring = flatbuffer.Wiring(flatbuffer.parsed(content))
        self._made = {tensor: node for node in graph.graph.node for tensor in node.output if tensor}
        self._readers = {}
        for node in graph.graph.node:
            for tensor in node.input:
                self._readers.setdefault(tensor, []).append(node)
        theirs = _of_onnx(graph, feed)
        mine = _of_file(content, given, self._wiring)
        by_size = {}
        for tensor, (size, one) in mine.items():
            by_size.setdefault(size, []).append((tensor, one))
        self._tensors = {name: _alike(one, by_size.get(size, ())) for name, (size, one) in theirs.items()}

    def operators(self, node):
        """Return the indices of the operators that do a node's work; empty if they cannot be told from the others."""
        before = self._before(node)
        ends = {tensor for name in self._next(node) for tensor in self._first(name, before)}
        known = {tensor for name in before for tensor in self._tensors.get(name, ())}
        found, pending = set(), list(ends)
        while pending:
            at = self._wiring.maker.get(pending.pop())
            if at is None or at in found:
                continue
            found.add(at)
            pending += [one for one in self._wiring.inputs[at] if one not in known and not self._wiring.constant(one)]
        return found

    def nodes(self, operators):
        """Return the names of the graph's nodes whose work these operators do, in the graph's order."""
        found = []
        for node in self.graph.graph.node:
            mine = self.operators(node)
            if mine and mine <= operators:
                found.append(node.name)
        return found

    def comparisons(self, operators):
        """Return the indices of the operators that make truth values of what these alone give. No numbers tell them;
        rounded before, they may turn."""
        found = set()
        for at, (given, made) in enumerate(zip(self._wiring.inputs, self._wiring.outputs, strict=True)):
            makers = {self._wiring.maker.get(one) for one in given if not self._wiring.constant(one)}
            kinds = {flatbuffer.kind_of(self._wiring.graph.tensors[one]) for one in made}
            if kinds == {"bool"} and makers and makers <= operators:
                found.add(at)
        return found

    def _before(self, node):
        """Return all tensors that a node depends on."""
        found, pending = set(), [name for name in node.input if name]
        while pending:
            name = pending.pop()
            if name in found:
                continue
            found.add(name)
            if name in self._made:
                pending += [one for one in self._made[name].input if one]
        return found

    def _next(self, node):
        """Return the node's outputs, or the nearest tensors behind them that the file has too."""
        found, pending, seen = [], list(node.output), set()
        while pending:
            name = pending.pop(0)
            if not name or name in seen:
                continue
            seen.add(name)
            if self._tensors.get(name):
                found.append(name)
            else:
                pending += [one for reader in self._readers.get(name, ()) for one in reader.output]
        return found

    def _first(self, name, before):
        """Return the first of the file's tensors that hold these numbers, excluding what the node reads. A node that
        gives what it reads (a bound that nothing reaches, attention to one position) has all that are made of equal
        ones."""
        alike = self._tensors[name]
        read = {tensor for one in before for tensor in self._tensors.get(one, ())}
        makers = {tensor: self._wiring.maker[tensor] for tensor in alike if tensor in self._wiring.maker}
        fresh = [tensor for tensor in makers if tensor not in read]
        if fresh:
            return sorted(fresh, key=makers.__getitem__)[:1]
        return [tensor for tensor, maker in makers.items() if set(alike) & set(self._wiring.inputs[maker])]


def _of_onnx(graph, feed):
    """Return fingerprints of all tensors that are float and not constant."""
    import onnx
    import onnxruntime

    wider = onnx.ModelProto()
    wider.CopyFrom(graph)
    have = {value.name for value in wider.graph.output}
    names = [name for node in graph.graph.node for name in node.output if name]
    wider.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in have)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(wider.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = zip(names, session.run(names, feed), strict=True)
    return {name: _print(array) for name, array in (*feed.items(), *made) if array.dtype.kind == "f" and array.size}


def _of_file(content, given, wiring):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
    )
    interpreter.allocate_tensors()
    for detail, array in zip(interpreter.get_input_details(), given, strict=True):
        interpreter.set_tensor(detail["index"], array)
    interpreter.invoke()
    found = {}
    for tensor in (*wiring.given, *wiring.maker):
        if flatbuffer.kind_of(wiring.graph.tensors[tensor]) == "float32":
            array = interpreter.get_tensor(tensor)
            if array.size:
                found[tensor] = _print(array)
    return found


def _print(array):
    """Return properties that do not depend on the order of axes: the number of elements, and five of their
    statistics."""
    flat = numpy.nan_to_num(array.reshape(-1).astype(numpy.float64), posinf=1e30, neginf=-1e30)
    return flat.size, numpy.array(
        [numpy.sqrt((flat**2).mean()), flat.mean(), numpy.abs(flat).mean(), flat.min(), flat.max()]
    )


def _alike(wanted, others):
    """Return the tensors of ``(tensor, fingerprint)`` that hold the wanted numbers. Kernels that approximate (GELU)
    leave a difference that grows with each layer: where none is near, the nearest is taken if nothing else comes close.
    """
    near = [tensor for tensor, other in others if _same(wanted, other)]
    if near or not others:
        return near
    nearest = min((other for _, other in others), key=lambda other: _distance(wanted, other))
    least = _distance(wanted, nearest)
    rest = [_distance(wanted, other) for _, other in others if not _same(nearest, other)]
    if least > _FAR or min(rest, default=numpy.inf) < _CLEARLY * least:
        return []
    return [tensor for tensor, other in others if _same(nearest, other)]


def _same(first, second):
    return _distance(first, second) <= _NEAR


def _distance(first, second):
    return float(numpy.abs(first - second).max() / max(first[0], 1e-12))

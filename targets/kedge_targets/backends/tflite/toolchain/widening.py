"""Gives single operators of a ``.tflite`` activations of 16 bits: weights int8, input and output int16, bias int64.

A quantizer has left these operators in float. An input that no such operator makes is rounded to 16 bits before the
operator, an output that others read is turned back into floats behind it, and between two such operators the numbers
stay what they are. Scales are symmetric, as TFLite's kernels for 16 bits want them.
"""

import copy

import flatbuffer
import numpy
from ai_edge_litert import schema_py_generated as schema

CHANNELS = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": None}
"""Operators that have kernels for 16 bits → the axis of their weights with a scale for each entry; None for one scale,
since tflite-runtime 2.14 has no others."""

_VERSIONS = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "FULLY_CONNECTED": 7}
_LARGEST = 32767
_TINY = 1e-12


def widen(model, operators):
    """Change operators, in place; without any, leave the model as it is.

    Args:
        operators: (operator, (low, high) of its input, (low, high) of its output), in the file's order.
    """
    if operators:
        _Widening(model).run(operators)


class _Widening:
    def __init__(self, model):
        self._model = model
        self._graph = model.subgraphs[0]
        self._wide = {}  # float tensor → its int16 tensor
        self._before = {}  # operator → operators to insert before it
        self._behind = {}

    def run(self, operators):
        changed = {id(operator) for operator, _, _ in operators}
        for operator, given, made in operators:
            self._change(operator, given, made)
        read = {int(tensor) for tensor in self._graph.outputs}
        for operator in self._graph.operators:
            if id(operator) not in changed:
                read |= {int(tensor) for tensor in operator.inputs}
        order = []
        for operator in self._graph.operators:
            order += self._before.get(id(operator), [])
            order.append(operator)
            order += [one for one in self._behind.get(id(operator), []) if int(one.outputs[0]) in read]
        self._graph.operators = order
        flatbuffer.drop_unused_tensors(self._model)
        flatbuffer.drop_unused_buffers(self._model)

    def _change(self, operator, given, made):
        name = flatbuffer.name_of(self._model, operator)
        inputs = [int(tensor) for tensor in operator.inputs]
        source, weight, bias = inputs[0], inputs[1], inputs[2] if len(inputs) > 2 else -1
        if source not in self._wide:
            self._wide[source] = self._tensor(source, "int16", [_scale(given)])
            self._before[id(operator)] = [self._operator("QUANTIZE", 2, source, self._wide[source])]
        step = float(self._graph.tensors[self._wide[source]].quantization.scale[0])
        weight, scales = self._weights(weight, CHANNELS[name])
        if bias >= 0:
            values = self._floats(bias).astype(numpy.float64) / (step * scales)
            bias = self._tensor(bias, "int64", step * scales, 0, numpy.rint(values).astype(numpy.int64))
        out = int(operator.outputs[0])
        self._wide[out] = self._tensor(out, "int16", [_scale(made)])
        self._behind[id(operator)] = [self._operator("DEQUANTIZE", 3, self._wide[out], out)]
        operator.inputs = [self._wide[source], weight, bias][: len(inputs)]
        operator.outputs = [self._wide[out]]
        old = self._model.operatorCodes[operator.opcodeIndex]
        operator.opcodeIndex = self._code(old.builtinCode, max(old.version, _VERSIONS[name]))

    def _weights(self, tensor, axis):
        values = self._floats(tensor)
        others = tuple(one for one in range(values.ndim) if one != axis)
        largest = numpy.abs(values).max() if axis is None else numpy.abs(values).max(axis=others)
        scales = numpy.maximum(numpy.atleast_1d(largest).astype(numpy.float64) / 127, _TINY)
        shape = [-1 if one == axis else 1 for one in range(values.ndim)]
        steps = numpy.rint(values / scales.reshape(shape)).clip(-127, 127).astype(numpy.int8)
        return self._tensor(tensor, "int8", scales, axis or 0, steps), scales

    def _floats(self, tensor):
        held = self._graph.tensors[tensor]
        data = self._model.buffers[held.buffer].data
        if flatbuffer.kind_of(held) != "float32" or data is None:
            raise RuntimeError(f"{held.name!r} is no float constant")
        return numpy.frombuffer(bytes(data), numpy.float32).reshape(held.shape if held.shape is not None else ())

    def _tensor(self, like, kind, scales, axis=0, values=None):
        """Add a tensor of another's shape."""
        made = copy.copy(self._graph.tensors[like])
        made.name = made.name + f"_{kind}".encode()
        made.type = flatbuffer.type_of(kind)
        made.quantization = schema.QuantizationParametersT()
        made.quantization.scale = numpy.asarray(scales, numpy.float32)
        made.quantization.zeroPoint = numpy.zeros(len(scales), numpy.int64)
        made.quantization.quantizedDimension = axis
        made.buffer = 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = numpy.frombuffer(values.tobytes(), numpy.uint8)
            made.buffer = len(self._model.buffers)
            self._model.buffers.append(buffer)
        self._graph.tensors.append(made)
        return len(self._graph.tensors) - 1

    def _operator(self, name, version, source, made):
        operator = schema.OperatorT()
        operator.opcodeIndex = self._code(getattr(schema.BuiltinOperator, name), version)
        operator.inputs, operator.outputs = [source], [made]
        return operator

    def _code(self, builtin, version):
        for index, code in enumerate(self._model.operatorCodes):
            if code.builtinCode == builtin and code.version == version and not code.customCode:
                return index
        code = schema.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), version
        self._model.operatorCodes.append(code)
        return len(self._model.operatorCodes) - 1


def _scale(bounds):
    return max(abs(bounds[0]), abs(bounds[1]), _TINY) / _LARGEST

"""Represents a ``.tflite`` as objects, with its operators by name, and edits it."""

import copy

from ai_edge_litert import schema_py_generated as schema

_OPERATORS = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_KINDS = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}

CUSTOM = schema.BuiltinOperator.CUSTOM


def parsed(content):
    """Return the file as objects."""
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def packed(model):
    """Return the objects as a file."""
    import flatbuffers

    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def name_of(model, operator):
    """Return an operator's name: ``CONV_2D``, or a custom operator's own name."""
    code = model.operatorCodes[operator.opcodeIndex]
    if code.customCode:
        return code.customCode.decode(errors="replace")
    return _OPERATORS[max(code.builtinCode, code.deprecatedBuiltinCode)]


def kind_of(tensor):
    """Return a tensor's dtype: ``float32``, ``int8`` …"""
    return _KINDS[tensor.type]


def type_of(kind):
    """Return the number by which a file calls a dtype."""
    return getattr(schema.TensorType, kind.upper())


def range_of(tensor):
    """Return (low, high) as calibration observed it, or None if it did not."""
    found = tensor.quantization
    if found is None or found.min is None or found.max is None or not len(found.min) or not len(found.max):
        return None
    return float(found.min[0]), float(found.max[0])


def represented(tensor):
    """Return (low, high) of what an int8 tensor can hold; None for other tensors and for those with several scales."""
    found = tensor.quantization
    if kind_of(tensor) != "int8" or found is None or found.scale is None or len(found.scale) != 1:
        return None
    scale, zero = float(found.scale[0]), int(found.zeroPoint[0])
    return (-128 - zero) * scale, (127 - zero) * scale


class Wiring:
    """The producer and the readers of each tensor of the main graph, by operators' indices."""

    def __init__(self, model):
        self.graph = model.subgraphs[0]
        self.names = [name_of(model, operator) for operator in self.graph.operators]
        self.inputs = [[int(i) for i in operator.inputs if i >= 0] for operator in self.graph.operators]
        self.outputs = [[int(i) for i in operator.outputs] for operator in self.graph.operators]
        self.maker = {tensor: at for at, tensors in enumerate(self.outputs) for tensor in tensors}
        self.readers = {}
        for at, tensors in enumerate(self.inputs):
            for tensor in dict.fromkeys(tensors):
                self.readers.setdefault(tensor, []).append(at)
        self.answers = [int(tensor) for tensor in self.graph.outputs]
        self.given = [int(tensor) for tensor in self.graph.inputs]
        self._model = model

    def constant(self, tensor):
        """Return whether the file holds a tensor's values."""
        return tensor not in self.maker and tensor not in self.given

    def bytes_of(self, tensor):
        """Return the bytes of a constant."""
        data = self._model.buffers[self.graph.tensors[tensor].buffer].data
        return 0 if data is None else len(data)

    def size_of(self, tensor):
        """Return the number of elements."""
        size = 1
        for axis in self.graph.tensors[tensor].shape if self.graph.tensors[tensor].shape is not None else ():
            size *= int(axis)
        return size


def hidden(model, indices):
    """Return the file with these operators under unknown names, and what is needed to restore them; the model stays as
    it is.

    A quantizer leaves an unknown operator alone: its inputs and outputs stay in float, without a scale that its
    neighbours would have to share.
    """
    graph, codes = model.subgraphs[0], model.operatorCodes
    operators = graph.operators
    graph.operators, model.operatorCodes = list(operators), list(codes)
    kept = {}
    for index in indices:
        operator = graph.operators[index] = copy.copy(operators[index])
        code = schema.OperatorCodeT()
        code.builtinCode = code.deprecatedBuiltinCode = CUSTOM
        code.customCode = hidden_name(index)
        code.version = 1
        kept[code.customCode] = (
            codes[operator.opcodeIndex],
            (operator.builtinOptionsType, operator.builtinOptions),
            (operator.builtinOptions2Type, operator.builtinOptions2),
        )
        operator.opcodeIndex = len(model.operatorCodes)
        model.operatorCodes.append(code)
        operator.builtinOptionsType = operator.builtinOptions2Type = 0
        operator.builtinOptions = operator.builtinOptions2 = operator.customOptions = None
    content = packed(model)
    graph.operators, model.operatorCodes = operators, codes
    return content, kept


def hidden_name(index):
    """Return the unknown name of the operator with this index."""
    return f"kept_in_float_{index}".encode()


def brought_back(model, kept):
    """Restore the names of hidden operators, in place; return hidden name → operator."""
    graph = model.subgraphs[0]
    found = {}
    for operator in graph.operators:
        name = model.operatorCodes[operator.opcodeIndex].customCode
        own = kept.get(name)
        if own is None:
            continue
        code, (operator.builtinOptionsType, operator.builtinOptions), second = own
        operator.builtinOptions2Type, operator.builtinOptions2 = second
        operator.customOptions = None
        operator.opcodeIndex = len(model.operatorCodes)
        model.operatorCodes.append(code)
        found[name] = operator
    _drop_unused_codes(model)
    return found


def _drop_unused_codes(model):
    """Remove the operator codes that no operator has any more, in place."""
    every = [operator for one in model.subgraphs for operator in one.operators or ()]
    used = sorted({operator.opcodeIndex for operator in every})
    for operator in every:
        operator.opcodeIndex = used.index(operator.opcodeIndex)
    model.operatorCodes = [model.operatorCodes[index] for index in used]


def without_rounding_at_the_ends(model):
    """Make an input or output of the file an integer if only a QUANTIZE reads it or a DEQUANTIZE produces it, in place.
    The integer tensor takes over the float one's name and place."""
    wiring = Wiring(model)
    graph = wiring.graph
    replaced, dropped = {}, set()
    for tensor in wiring.given:
        readers = wiring.readers.get(tensor, [])
        if len(readers) == 1 and wiring.names[readers[0]] == "QUANTIZE" and tensor not in wiring.answers:
            replaced[tensor] = wiring.outputs[readers[0]][0]
            dropped.add(readers[0])
    for tensor in wiring.answers:
        maker = wiring.maker.get(tensor)
        if maker is None or wiring.names[maker] != "DEQUANTIZE" or tensor in replaced.values():
            continue
        source = wiring.inputs[maker][0]
        if source in wiring.given or source in replaced.values():
            continue
        replaced[tensor] = source
        if not wiring.readers.get(tensor):
            dropped.add(maker)
    for old, new in replaced.items():
        names = graph.tensors[old].name, graph.tensors[new].name
        graph.tensors[new].name, graph.tensors[old].name = names
    graph.inputs = [replaced.get(int(tensor), int(tensor)) for tensor in graph.inputs]
    graph.outputs = [replaced.get(int(tensor), int(tensor)) for tensor in graph.outputs]
    for signature in model.signatureDefs or ():
        for item in (*(signature.inputs or ()), *(signature.outputs or ())):
            item.tensorIndex = replaced.get(int(item.tensorIndex), int(item.tensorIndex))
    graph.operators = [operator for at, operator in enumerate(graph.operators) if at not in dropped]
    drop_unused_tensors(model)


def drop_unused_tensors(model):
    """Remove tensors that nothing reads or produces any more, in place."""
    graph = model.subgraphs[0]
    used = {int(tensor) for tensor in (*graph.inputs, *graph.outputs)}
    for operator in graph.operators:
        used |= {int(tensor) for tensor in (*operator.inputs, *operator.outputs) if tensor >= 0}
        used |= {int(tensor) for tensor in (operator.intermediates if operator.intermediates is not None else ())}
    place = {old: new for new, old in enumerate(sorted(used))}
    graph.tensors = [graph.tensors[old] for old in sorted(used)]
    graph.inputs = [place[int(tensor)] for tensor in graph.inputs]
    graph.outputs = [place[int(tensor)] for tensor in graph.outputs]
    for operator in graph.operators:
        operator.inputs = [place.get(int(tensor), -1) for tensor in operator.inputs]
        operator.outputs = [place[int(tensor)] for tensor in operator.outputs]
        if operator.intermediates is not None:
            operator.intermediates = [place[int(tensor)] for tensor in operator.intermediates]
    for signature in model.signatureDefs or ():
        for item in (*(signature.inputs or ()), *(signature.outputs or ())):
            item.tensorIndex = place[int(item.tensorIndex)]


def drop_unused_buffers(model):
    """Remove the content that no tensor and no metadata has any more, in place; the first buffer is the empty one."""
    tensors = [tensor for graph in model.subgraphs for tensor in graph.tensors]
    owners = [*tensors, *(model.metadata or ())]
    used = sorted({0, *(int(one.buffer) for one in owners), *(int(one) for one in model.metadataBuffer or ())})
    place = {old: new for new, old in enumerate(used)}
    model.buffers = [model.buffers[old] for old in used]
    for one in owners:
        one.buffer = place[int(one.buffer)]
    if model.metadataBuffer is not None:
        model.metadataBuffer = [place[int(one)] for one in model.metadataBuffer]

"""Which layers a bundle leaves in float, named as a quantizer by hand has to be told."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_WEIGHTED = frozenset({"Conv", "Gemm", "MatMul"})


def of_bundle(file: Path, source: Path, named: Sequence[str]) -> list[str]:
    """Return the names of the operators that compute in float, weights or none: of ONNX nodes, or of what TFLite
    operators give.

    Args:
        file: of the bundle.
        source: what the quantizer by hand starts from.
        named: the layers that the report names, for a file that does not keep the nodes' names.
    """
    if file.suffix == ".onnx":
        return _nodes(file, source)
    return _tensors(file, source) if file.suffix == ".tflite" else list(named)


def _nodes(file: Path, source: Path) -> list[str]:
    import onnx

    graph = onnx.load(str(file)).graph
    read_back = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    rounded = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}

    def in_integers(node: onnx.NodeProto) -> bool:
        if node.op_type in _WEIGHTED:
            return node.input[1] in read_back
        return not read_back.isdisjoint(node.input) and not rounded.isdisjoint(node.output)

    # A node that is gone was folded into another one, or into a constant.
    floats = {node.name for node in graph.node if not in_integers(node)}
    return [node.name for node in onnx.load(str(source)).graph.node if node.name in floats]


def _tensors(file: Path, source: Path) -> list[str]:
    from ai_edge_litert import schema_py_generated as schema

    def given(path: Path) -> dict[str, bool]:
        """Each operator's first output, and whether it is float and computed, not only read back."""
        model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        graph = model.subgraphs[0]
        tensors = {}
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            reading = max(code.builtinCode, code.deprecatedBuiltinCode) == schema.BuiltinOperator.DEQUANTIZE
            tensor = graph.tensors[operator.outputs[0]]
            tensors[tensor.name.decode()] = tensor.type == schema.TensorType.FLOAT32 and not reading
        return tensors

    ours = given(file)
    return [name for name in given(source) if ours.get(name, False)]

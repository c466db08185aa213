"""Lists the layers that a plan decides about: those with a constant weight, and products of two activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer.

    Attributes:
        name, operator: of the node (``Conv``, ``ConvTranspose``, ``Gemm``, ``MatMul``, ``Gather``).
        activations: tensors that the layer multiplies and that are not constant: one, two for a product of two
            activations, none for ``Gather`` (a table of embeddings).
        activation_inputs: the indices of these inputs.
        weight: tensor name of the weight as the node takes it; None for a product of two activations.
        weight_input: its index.
        axis: of the weight's output channels; None where it has none (a vector).
        size: numbers in the weight; 0 without one.
    """

    name: str
    operator: str
    activations: tuple[str, ...]
    activation_inputs: tuple[int, ...]
    weight: str | None = None
    weight_input: int = 1
    axis: int | None = None
    size: int = 0


def layers(model: onnx.ModelProto, wiring: Wiring | None = None) -> list[Layer]:
    """Return all layers in graph order: Conv, ConvTranspose, Gemm, MatMul, and Gather from a constant float table."""
    wiring = wiring or Wiring(model)
    found = (_layer(node, wiring) for node in model.graph.node if node.domain in ("", "ai.onnx"))
    return [layer for layer in found if layer is not None]


def _layer(node: onnx.NodeProto, wiring: Wiring) -> Layer | None:
    if node.op_type in ("Conv", "ConvTranspose"):
        return _weighted(node, wiring, axis=0 if node.op_type == "Conv" else 1)
    if node.op_type == "Gemm":
        turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return _weighted(node, wiring, axis=0 if turned else 1)
    if node.op_type == "Gather":
        table = weight_value(node.input[0], wiring)
        if table is None or table.ndim < 2 or table.dtype.kind != "f":
            return None
        return Layer(
            name=node.name, operator="Gather", activations=(), activation_inputs=(), weight=node.input[0],
            weight_input=0, axis=0, size=table.size,
        )  # fmt: skip
    return _product(node, wiring) if node.op_type == "MatMul" else None


def _weighted(node: onnx.NodeProto, wiring: Wiring, *, axis: int) -> Layer | None:
    weight = weight_value(node.input[1], wiring)
    if weight is None or weight_value(node.input[0], wiring) is not None:
        return None
    return Layer(
        name=node.name, operator=node.op_type, activations=(node.input[0],), activation_inputs=(0,),
        weight=node.input[1], axis=axis, size=weight.size,
    )  # fmt: skip


def _product(node: onnx.NodeProto, wiring: Wiring) -> Layer | None:
    left, right = (weight_value(tensor, wiring) for tensor in node.input)
    if left is None and right is None:
        return Layer(
            name=node.name, operator="MatMul", activations=tuple(node.input), activation_inputs=(0, 1)
        )  # fmt: skip
    if left is not None and right is not None:
        return None
    index = 1 if right is not None else 0
    weight = right if right is not None else left
    if weight is None or weight.dtype.kind != "f":
        return None
    # The channels of the output are the columns of a right weight, the rows of a left one.
    axis = None if weight.ndim < 2 else weight.ndim - (1 if index == 1 else 2)
    return Layer(
        name=node.name, operator="MatMul", activations=(node.input[1 - index],), activation_inputs=(1 - index,),
        weight=node.input[index], weight_input=index, axis=axis, size=weight.size,
    )  # fmt: skip


def weight_value(tensor: str, wiring: Wiring) -> Array | None:
    """Return the constant behind a weight, before QONNX quantization or transposition."""
    value = wiring.constant(tensor)
    if value is not None:
        return np.asarray(value)
    node = wiring.maker.get(tensor)
    if node is None:
        return None
    if node.op_type in ("Quant", "IntQuant", "BipolarQuant"):
        return weight_value(node.input[0], wiring)
    if node.op_type == "Transpose":
        inner = weight_value(node.input[0], wiring)
        orders = [tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"]
        return None if inner is None else np.transpose(inner, orders[0] if orders else None)
    return None

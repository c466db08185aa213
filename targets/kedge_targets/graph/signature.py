"""A graph's inputs and outputs as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kedge_protocol.bundle.config import NO_BATCH, TEXT, FileTensor, TensorSpec
from kedge_protocol.errors import ModelError
from kedge_targets.graph.layout import layout_of

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """One input or output.

    Attributes:
        name: in the graph.
        shape: None for a free dimension.
        dtype: numpy's name (``float32``); :data:`~kedge_protocol.bundle.config.TEXT` for texts.
        layout: of an input whose layout the graph tells, see :func:`kedge_targets.graph.layout.layout_of`.
        batch_axis: in the user's model, where that is not this graph (:mod:`kedge_targets.graph.batch_axes`);
            :data:`~kedge_protocol.bundle.config.NO_BATCH` where it has none there.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    layout: str | None = None
    batch_axis: int = 0

    @property
    def batched(self) -> bool:
        """Whether it has a batch in the user's model."""
        return self.batch_axis != NO_BATCH


def inputs(model: onnx.ModelProto) -> list[TensorInfo]:
    """Return the inputs that a caller must give, without initializers that are listed as inputs too.

    Raises:
        ModelError: an input is no tensor, has no shape, or there is none.
    """
    constant = {tensor.name for tensor in model.graph.initializer}
    constant |= {tensor.values.name for tensor in model.graph.sparse_initializer}
    found = [
        _info(value, "input", layout_of(model, value.name)) for value in model.graph.input if value.name not in constant
    ]
    if not found:
        raise ModelError("the model has no input", remedy="Export it with at least one input")
    return found


def outputs(model: onnx.ModelProto) -> list[TensorInfo]:
    """Return the model's outputs; raises as :func:`inputs`."""
    return [_info(value, "output", None) for value in model.graph.output]


def _info(value: onnx.ValueInfoProto, kind: str, layout: str | None) -> TensorInfo:
    import onnx

    where = f"{kind} {value.name!r}"
    if not value.type.HasField("tensor_type"):
        raise ModelError(f"is a {value.type.WhichOneof('value')}, not a tensor", where=where)
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        raise ModelError(
            "has no shape", where=where, remedy="Export the model with the rank of its inputs and outputs known"
        )
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in tensor.shape.dim)
    texts = tensor.elem_type == onnx.TensorProto.STRING
    dtype = TEXT if texts else str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return TensorInfo(name=value.name, shape=shape, dtype=dtype, layout=layout)


def specs(tensors: Iterable[TensorInfo], *, layouts: Mapping[str, str | None] | None = None) -> tuple[TensorSpec, ...]:
    """Return the specifications for a backend whose files keep the model's names, order, axes and types.

    Args:
        tensors: of the file.
        layouts: name → layout as the trained model's own graph tells it; without it the tensors' own.
    """
    return tuple(
        TensorSpec(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            layout=tensor.layout if layouts is None else layouts.get(tensor.name),
            file=FileTensor(name=tensor.name, index=index, shape=tensor.shape, dtype=tensor.dtype),
        )
        for index, tensor in enumerate(tensors)
    )

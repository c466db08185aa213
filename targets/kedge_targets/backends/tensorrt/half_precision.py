"""Simulates a GPU that rounds products to half precision, so that tolerances leave room for it.

ONNX Runtime computes half precision on a CPU in single precision between the layers; GPUs have kernels that sum in
half. Rounding each product once more is equivalent to moving each weight by one step of half precision, randomly up or
down (backward error); this is done here, always with the same seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import MissingDependencyError
from kedge_protocol.packages import pip_install

if TYPE_CHECKING:
    import onnx

_SEED = 0


def of(graph: Path) -> bytes:
    """Return the graph with every half-precision weight moved by one step.

    Raises:
        MissingDependencyError: the package ``onnx`` is missing; only the host calls this function.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError(
            f"onnx cannot be loaded: {error}", remedy=f"Install it with {pip_install('compile')}"
        ) from error
    model = onnx.load(graph)
    for number, tensor in enumerate(model.graph.initializer):
        if tensor.data_type == onnx.TensorProto.FLOAT16:
            _move(tensor, _SEED + number)
    return bytes(model.SerializeToString())


def _move(tensor: onnx.TensorProto, seed: int) -> None:
    import numpy as np
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    up = np.random.default_rng(seed).integers(0, 2, size=values.shape, dtype=np.int8).astype(bool)
    limit = np.float16(np.inf)
    moved = np.where(up, np.nextafter(values, limit), np.nextafter(values, -limit))
    # What is 0 stays so: no product comes of it.
    tensor.CopyFrom(numpy_helper.from_array(np.where(values == 0, values, moved).astype(np.float16), tensor.name))

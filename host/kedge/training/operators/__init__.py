"""ONNX operators implemented in PyTorch, one module for each kind; :func:`find` looks them up."""

from __future__ import annotations

from kedge.training.operators import (
    arithmetic,
    indexing,
    layers,
    logic,
    normalization,
    pooling,
    quantization,
    reduction,
    resize,
    shapes,
    transformer,
)
from kedge.training.operators.kernel import Call, Kernel, Table

_TABLES: tuple[Table, ...] = (
    arithmetic.TABLE,
    transformer.TABLE,
    indexing.TABLE,
    layers.TABLE,
    logic.TABLE,
    normalization.TABLE,
    pooling.TABLE,
    quantization.TABLE,
    reduction.TABLE,
    resize.TABLE,
    shapes.TABLE,
)
_KERNELS: dict[tuple[str, str], Kernel] = {key: kernel for table in _TABLES for key, kernel in table.kernels.items()}


def find(operator: str, domain: str = "") -> Kernel | None:
    """Return the kernel of an operator; None if there is none.

    Args:
        domain: the empty string is ONNX's own domain.
    """
    return _KERNELS.get((operator, domain))


def known() -> frozenset[tuple[str, str]]:
    """Return ``(operator, domain)`` of all operators that have a kernel."""
    return frozenset(_KERNELS)


__all__ = ["Call", "Kernel", "find", "known"]

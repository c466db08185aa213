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
    """The kernel of an operator; None where it is not known here.

    Args:
        domain: the empty string is ONNX's own.
    """
    return _KERNELS.get((operator, domain))


def known() -> frozenset[tuple[str, str]]:
    """``(operator, domain)`` of all that are known here."""
    return frozenset(_KERNELS)


__all__ = ["Call", "Kernel", "find", "known"]

"""ONNX operators as PyTorch computes them, a room for each kind; :func:`find` knows which are there."""

from __future__ import annotations

from kedge.compression.training.operators import (
    arithmetic,
    attending,
    indexing,
    layers,
    logic,
    normalizing,
    pooling,
    quantizing,
    reducing,
    resizing,
    shaping,
)
from kedge.compression.training.operators.call import Call, Kernel, Table

_TABLES: tuple[Table, ...] = (
    arithmetic.TABLE,
    attending.TABLE,
    indexing.TABLE,
    layers.TABLE,
    logic.TABLE,
    normalizing.TABLE,
    pooling.TABLE,
    quantizing.TABLE,
    reducing.TABLE,
    resizing.TABLE,
    shaping.TABLE,
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

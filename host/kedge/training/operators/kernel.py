"""The arguments of a kernel, and the tables in which kernels are registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from kedge_protocol.errors import StepError

Tensor: TypeAlias = torch.Tensor
Given: TypeAlias = Sequence[Tensor | None]
"""A node's inputs; None for an omitted optional one."""
Kernel: TypeAlias = Callable[["Call", Given], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A node as its kernel sees it.

    Attributes:
        name, operator: of the node.
        opset: version of the operator's domain that the model imports.
        attributes: name → value; tensors are torch's, strings are decoded.
        outputs: number of outputs that the node names.
    """

    name: str
    operator: str
    opset: int
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the operator's default."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> StepError:
        """Return the error for an unsupported variant of the operator."""
        return StepError(
            f"{self.operator} with {what} cannot be trained here",
            where=f"node {self.name!r}",
            remedy="Leave this step out of the recipe, or export the model without it",
        )


class Table:
    """Kernels by operator and domain."""

    def __init__(self, domain: str = "") -> None:
        self.kernels: dict[tuple[str, str], Kernel] = {}
        self._domain = domain

    def add(self, *operators: str, domain: str | None = None) -> Callable[[Kernel], Kernel]:
        """Return a decorator that registers a kernel under these names."""

        def enter(kernel: Kernel) -> Kernel:
            self.put(kernel, *operators, domain=domain)
            return kernel

        return enter

    def put(self, kernel: Kernel, *operators: str, domain: str | None = None) -> None:
        """Register a kernel under these names."""
        for operator in operators:
            self.kernels[operator, self._domain if domain is None else domain] = kernel


def at(given: Given, index: int) -> Tensor | None:
    """Return an input, or None if it is omitted."""
    return given[index] if index < len(given) else None


def need(given: Given, index: int) -> Tensor:
    """Return an input that the operator's definition requires (the model was checked when it was read)."""
    tensor = given[index]
    if tensor is None:
        raise StepError(f"input {index} of a node is left out", remedy="Export the model again")
    return tensor


def whole(tensor: Tensor | None) -> list[int] | None:
    """Return an integer tensor (a shape, axes, pads) as a list of Python integers."""
    return None if tensor is None else [int(value) for value in tensor.reshape(-1).tolist()]


def wholes(call: Call, given: Given, name: str, index: int) -> list[int] | None:
    """Return integers that are an attribute in old opsets and an input in new ones; None if they are neither."""
    if name in call.attributes:
        value = call.attributes[name]
        return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]
    return whole(at(given, index))

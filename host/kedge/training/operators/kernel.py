"""What a kernel is given, and the tables that kernels are entered in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch

from kedge_protocol.errors import StepError

Tensor: TypeAlias = torch.Tensor
Given: TypeAlias = Sequence[Tensor | None]
"""A node's inputs; None where an optional one is left out."""
Kernel: TypeAlias = Callable[["Call", Given], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """One node, as its kernel sees it.

    Attributes:
        name, operator: of the node.
        opset: version of the operator's domain that the model imports.
        attributes: name → value; tensors as torch has them, strings decoded.
        outputs: how many the node names.
    """

    name: str
    operator: str
    opset: int
    attributes: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the operator's default."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> StepError:
        """The error for a variant that is not known here."""
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
        """A decorator that enters a kernel under these names."""

        def enter(kernel: Kernel) -> Kernel:
            self.put(kernel, *operators, domain=domain)
            return kernel

        return enter

    def put(self, kernel: Kernel, *operators: str, domain: str | None = None) -> None:
        """Enter a kernel under these names."""
        for operator in operators:
            self.kernels[operator, self._domain if domain is None else domain] = kernel


def at(given: Given, index: int) -> Tensor | None:
    """An optional input."""
    return given[index] if index < len(given) else None


def need(given: Given, index: int) -> Tensor:
    """An input that the operator's definition demands (the model was checked as it was read)."""
    tensor = given[index]
    if tensor is None:
        raise StepError(f"input {index} of a node is left out", remedy="Export the model again")
    return tensor


def whole(tensor: Tensor | None) -> list[int] | None:
    """A tensor of whole numbers (a shape, axes, pads) as Python's own."""
    return None if tensor is None else [int(value) for value in tensor.reshape(-1).tolist()]


def wholes(call: Call, given: Given, name: str, index: int) -> list[int] | None:
    """What was an attribute in old opsets and is an input in new ones; None where it is neither."""
    if name in call.attributes:
        value = call.attributes[name]
        return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]
    return whole(at(given, index))

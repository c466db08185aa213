"""What a backend's numerics can be, and the plan that the host makes of them: plain data."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Precision(str, enum.Enum):
    """The numbers that a layer computes with; ordered from small to large."""

    INT8 = "int8"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class Granularity(str, enum.Enum):
    """How many scales a weight tensor has."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"


@dataclass(frozen=True, kw_only=True)
class QuantizedType:
    """One way of int8 that a backend can carry.

    Attributes:
        activation: ``int8`` or ``uint8``.
        weight: ``int8`` or ``uint8``.
        symmetric_activation: zero-point fixed at the middle.
        granularity: of the weights.
        reduced_range: weights use 7 bits, so that processors without VNNI do not saturate their 16-bit sums.
    """

    activation: str
    weight: str
    symmetric_activation: bool
    granularity: Granularity
    reduced_range: bool = False


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """What a backend declares.

    Attributes:
        precisions: that it can lower a whole graph to.
        quantized: its ways of int8, best first.
        mixed: whether single layers may have another precision than the rest.
        layouts: of 4-D activations in its own files (``NCHW``, ``NHWC``).
        operators: ONNX operators (default domain) that it takes; None where only its toolchain knows.
    """

    precisions: tuple[Precision, ...]
    quantized: tuple[QuantizedType, ...]
    mixed: bool
    layouts: tuple[str, ...]
    operators: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The host's decision for one graph.

    Attributes:
        default: precision of every layer that ``layers`` does not name.
        layers: node name → precision.
        quantized: the way of int8, where any layer is int8.
    """

    default: Precision
    layers: dict[str, Precision] = field(default_factory=dict)
    quantized: QuantizedType | None = None

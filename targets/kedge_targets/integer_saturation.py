"""Tells which 8-bit sums are safe on which processor; see docs/decisions/004-activation-types.md."""

from __future__ import annotations

from kedge_targets.numerics import Granularity, QuantizationScheme
from kedge_targets.target import Processor

FULL_RANGE = QuantizationScheme(
    activation="uint8", weight="int8", symmetric_activation=False, granularity=Granularity.PER_CHANNEL
)
"""The fastest on x86, and safe where products of 8 bits are added in 32 bits."""

SEVEN_BITS = QuantizationScheme(
    activation="uint8",
    weight="int8",
    symmetric_activation=False,
    granularity=Granularity.PER_CHANNEL,
    reduced_range=True,
)
"""The same with weights of 7 bits, which cannot saturate the 16-bit sums of processors without VNNI."""

_DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8"})
"""Instruction sets of x86 that add products of 8 bits in 32 bits."""


def may_saturate(processor: Processor) -> bool:
    """Whether some device of this kind may add products of 8 bits in 16 bits. ARM does not, whatever the signs."""
    return processor.architecture == "x86_64" and not _DOT_PRODUCTS & set(processor.instruction_sets)

"""A decoder that others exported to ONNX, with past and present as inputs and outputs."""

from __future__ import annotations

from dataclasses import dataclass

PAST, PRESENT = "past_key_values", "present"
"""The names are ``past_key_values.N.key`` and ``.value``, ``present.N.key`` and ``.value``."""
KNOWN = ("input_ids", "attention_mask", "position_ids", "num_logits_to_keep", "logits_to_keep")
"""Inputs besides the past."""


@dataclass(frozen=True, kw_only=True)
class ExportedSpec:
    """What the file says of itself.

    Attributes:
        vocabulary, layers, kv_heads, head_size: as in :class:`kedge_targets.decoder.spec.DecoderSpec`.
        itemsize: bytes of a stored number.
        roundable: whether a product has a float32 constant that can be stored in codes.
    """

    vocabulary: int
    layers: int
    kv_heads: int
    head_size: int
    itemsize: int
    roundable: bool

    @property
    def position_bytes(self) -> int:
        """Return the bytes of all caches for one position."""
        return 2 * self.layers * self.kv_heads * self.head_size * self.itemsize

"""A decoder that was read: its specification, its weights, its text side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kedge.importing.decoders.text import TextFiles
from kedge_targets.decoder.spec import Array, DecoderSpec


class Weights(Protocol):
    """See :class:`kedge_targets.decoder.spec.Weights`."""

    def outer(self, name: str) -> Array:
        """A tensor outside the layers."""

    def has_bias(self, name: str) -> bool:
        """Whether one has a bias."""

    def layer(self, index: int) -> dict[str, Array]:
        """A layer's tensors."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder that can be lowered.

    Attributes:
        weights: read when they are asked for.
        source_digest, size_bytes: of the user's files.
        parameters: how many weights there are.
    """

    spec: DecoderSpec
    weights: Weights
    text: TextFiles
    source_digest: str
    size_bytes: int
    parameters: int

"""An imported decoder: its specification, its weights, its text side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from kedge.importing.decoders.text import TextFiles
from kedge_targets.decoder.spec import Array, DecoderSpec


class Weights(Protocol):
    """See :class:`kedge_targets.decoder.spec.Weights`."""

    def outer(self, name: str) -> Array:
        """Return a tensor outside the layers."""

    def has_bias(self, name: str) -> bool:
        """Return whether a tensor has a bias."""

    def layer(self, index: int) -> dict[str, Array]:
        """Return a layer's tensors."""


class EncoderWeights(Weights, Protocol):
    """Weights of an encoder-decoder."""

    def has(self, name: str) -> bool:
        """Return whether there is a tensor of this name outside the layers."""

    def encoder_layer(self, index: int) -> dict[str, Array]:
        """Return a layer of the encoder."""


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder that can be lowered.

    Attributes:
        weights: read on demand.
        source_digest, size_bytes: digest and size of the user's files.
        parameters: number of weights.
    """

    spec: DecoderSpec
    weights: Weights
    text: TextFiles
    source_digest: str
    size_bytes: int
    parameters: int

"""A decoder's weights in memory, as pruning and training change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedge_targets.decoder.spec import Array, DecoderSpec, Weights


@dataclass(frozen=True, kw_only=True)
class HeldWeights:
    """All float weights of a decoder, float32; see :class:`kedge_targets.decoder.spec.Weights` for the names.

    Attributes:
        outside: tensors outside the layers.
        layers: the tensors of each layer.
    """

    outside: Mapping[str, Array]
    layers: Sequence[Mapping[str, Array]]

    def outer(self, name: str) -> Array:
        """Return a tensor outside the layers."""
        return self.outside[name]

    def has_bias(self, name: str) -> bool:
        """Return whether a tensor has a bias."""
        return f"{name}.bias" in self.outside

    def layer(self, index: int) -> dict[str, Array]:
        """Return a layer's tensors."""
        return dict(self.layers[index])


@dataclass(frozen=True, kw_only=True)
class HeldDecoder:
    """A decoder in memory.

    Attributes:
        origins: for each layer, the layer of the float model that it was.
    """

    spec: DecoderSpec
    weights: HeldWeights
    origins: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Return the number of weights."""
        held = [*self.weights.outside.values(), *(one for layer in self.weights.layers for one in layer.values())]
        return sum(array.size for array in held)


def held(spec: DecoderSpec, weights: Weights, *, norm_bias: bool) -> HeldDecoder:
    """Read all weights into memory."""
    names = ["embedding", "norm"]
    names += ["norm.bias"] * norm_bias + ["positions"] * spec.learned_positions + ["head"] * (not spec.tied)
    count = len(spec.layers)
    return HeldDecoder(
        spec=spec,
        weights=HeldWeights(
            outside={name: weights.outer(name) for name in names},
            layers=[weights.layer(index) for index in range(count)],
        ),
        origins=tuple(range(count)),
    )

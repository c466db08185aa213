"""A decoder as a PyTorch module, for importance and distillation. It computes whole sequences, without a cache."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import torch
from torch.nn import functional

from kedge.training.decoder.weights import HeldDecoder, HeldWeights
from kedge_targets.decoder.spec import LayerKind

Tensor: TypeAlias = torch.Tensor


@dataclass
class Answers:
    """What a decoder computes for sequences.

    Attributes:
        logits: [sequences, positions, vocabulary].
        hidden: the output of each layer, [sequences, positions, channels].
        attention: each layer's attention maps, [sequences, heads, positions, positions]; empty unless asked for.
    """

    logits: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


class DecoderNetwork(torch.nn.Module):  # type: ignore[misc]
    """A decoder that torch computes on the CPU in float32. The tensors of its layers and the last norm are parameters;
    embedding, positions and head are not trained."""

    def __init__(self, decoder: HeldDecoder) -> None:
        super().__init__()
        self.decoder, self.spec = decoder, decoder.spec
        self.layers = torch.nn.ModuleList()
        for index in range(len(self.spec.layers)):
            layer = torch.nn.ParameterDict()
            for name, array in decoder.weights.layer(index).items():
                layer[_key(name)] = torch.nn.Parameter(torch.tensor(array))
            self.layers.append(layer)
        outside = decoder.weights.outside
        self.ends = torch.nn.ParameterDict(
            {_key(name): torch.nn.Parameter(torch.tensor(outside[name])) for name in outside if name.startswith("norm")}
        )
        self._embedding = torch.tensor(outside["embedding"])
        self._positions = torch.tensor(outside["positions"]) if self.spec.learned_positions else None
        self._head = self._embedding if self.spec.tied else torch.tensor(outside["head"])

    def forward(self, tokens: Tensor, *, attention: bool = False, without: Collection[int] = ()) -> Answers:
        """Compute sequences of one length.

        Args:
            tokens: int64 [sequences, positions].
            attention: whether attention maps are kept.
            without: layers to leave out.
        """
        spec, found = self.spec, Answers(logits=torch.empty(0))
        x = self._embedding[tokens] * spec.embedding_scale
        if self._positions is not None:
            x = x + self._positions[: tokens.shape[1]]
        for index, kind in enumerate(spec.layers):
            if index not in without:
                x = self._layer(x, self.layers[index], kind, found if attention else None)
            found.hidden.append(x)
        found.logits = self._norm(x, self.ends, "norm") @ self._head.T
        return found

    def written(self) -> HeldDecoder:
        """Return the decoder with its parameters as they are now."""
        names = [list(self.decoder.weights.layer(index)) for index in range(len(self.layers))]
        layers = [
            {name: layer[_key(name)].detach().numpy().copy() for name in own}
            for own, layer in zip(names, self.layers, strict=True)
        ]
        outside = dict(self.decoder.weights.outside)
        for name in outside:
            if name.startswith("norm"):
                outside[name] = self.ends[_key(name)].detach().numpy().copy()
        return HeldDecoder(
            spec=self.spec, weights=HeldWeights(outside=outside, layers=layers), origins=self.decoder.origins
        )

    def _layer(self, x: Tensor, own: torch.nn.ParameterDict, kind: LayerKind, found: Answers | None) -> Tensor:
        out = self._attention(self._norm(x, own, "attention_norm"), own, kind, found)
        x = x + (self._norm(out, own, "attention_post_norm") if self.spec.post_norms else out)
        out = self._inner(self._norm(x, own, "feed_forward_norm"), own)
        return x + (self._norm(out, own, "feed_forward_post_norm") if self.spec.post_norms else out)

    def _norm(self, x: Tensor, own: torch.nn.ParameterDict, name: str) -> Tensor:
        spec, weight = self.spec, own[name]
        if spec.norm == "layer":
            return functional.layer_norm(x, weight.shape, weight, own[_key(f"{name}.bias")], spec.norm_epsilon)
        return self._root_mean_square(x, weight)

    def _root_mean_square(self, x: Tensor, weight: Tensor) -> Tensor:
        size = torch.sqrt((x * x).mean(-1, keepdim=True) + self.spec.norm_epsilon)
        return x / size * (weight + self.spec.norm_offset)

    def _heads(self, x: Tensor, own: torch.nn.ParameterDict, name: str, kind: LayerKind) -> Tensor:
        """Return [sequences, heads, positions, head size], normalized and rotated where the model does that."""
        y = _projected(x, own, name).unflatten(-1, (-1, self.spec.head_size))
        if name != "v" and self.spec.qk_norm:
            y = self._root_mean_square(y, own[f"{name}_norm"])
        y = y.transpose(1, 2)
        return y if name == "v" or kind.rotary is None else _turned(y, kind.rotary.frequencies(self.spec.head_size))

    def _attention(self, x: Tensor, own: torch.nn.ParameterDict, kind: LayerKind, found: Answers | None) -> Tensor:
        spec = self.spec
        q, k, v = (self._heads(x, own, name, kind) for name in "qkv")
        each = spec.heads // spec.kv_heads
        k, v = k.repeat_interleave(each, dim=1), v.repeat_interleave(each, dim=1)
        back = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        hidden = (back < 0) | (back >= (kind.window or x.shape[1]))
        if found is None:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=spec.attention_scale)
        else:
            scores = (q @ k.transpose(-1, -2) * spec.attention_scale).masked_fill(hidden, float("-inf"))
            found.attention.append(scores.softmax(-1))
            mixed = found.attention[-1] @ v
        return _projected(mixed.transpose(1, 2).flatten(-2), own, "o")

    def _inner(self, x: Tensor, own: torch.nn.ParameterDict) -> Tensor:
        up = _projected(x, own, "up")
        inner = self._activated(_projected(x, own, "gate")) * up if self.spec.gated else self._activated(up)
        return _projected(inner, own, "down")

    def _activated(self, x: Tensor) -> Tensor:
        return functional.silu(x) if self.spec.activation == "silu" else functional.gelu(x, approximate="tanh")


def _key(name: str) -> str:
    """Return a tensor's name as a parameter's: torch allows no dots."""
    return name.replace(".", "_of_")


def _projected(x: Tensor, own: torch.nn.ParameterDict, name: str) -> Tensor:
    bias = _key(f"{name}.bias")
    return functional.linear(x, own[name], own.get(bias))


def _turned(x: Tensor, frequencies: np.ndarray) -> Tensor:
    """Rotate the first channels of each head by pairs (:class:`kedge_targets.decoder.spec.Rotary`)."""
    angles = torch.tensor(np.outer(np.arange(x.shape[-2]), frequencies))
    cosines, sines = torch.cos(angles).float(), torch.sin(angles).float()
    half = len(frequencies)
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cosines - second * sines, second * cosines + first * sines, x[..., 2 * half :]]
    return torch.cat(turned, dim=-1)

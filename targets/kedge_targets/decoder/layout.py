"""Arranges head channels in the order and number that attention kernels need.

Kernels rotate channel ``j`` together with ``j + size / 2`` for every ``j``, and need ``size`` to be a multiple of some
number. Heads of another size get channels that are always 0, and partially rotated heads get channels whose frequency
is 0; the function stays the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.decoder.spec import DecoderSpec, LayerKind

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """The positions of a head's channels in the kernel's layout.

    Attributes:
        size: channels of a head in the kernel.
        places: the kernel's channel for each of the model's channels [head_size].
    """

    size: int
    places: tuple[int, ...]

    @classmethod
    def of(cls, spec: DecoderSpec, *, multiple: int = 16) -> HeadLayout:
        """Return the layout for kernels that need ``size`` to be a multiple of ``multiple``."""
        size = -(-spec.head_size // multiple) * multiple
        turning = turning_channels(spec)
        half, rest = turning // 2, spec.head_size - turning
        pairs = [*range(half), *(size // 2 + at for at in range(half))]
        upper = rest // 2
        fixed = [*(half + at for at in range(rest - upper)), *(size // 2 + half + at for at in range(upper))]
        return cls(size=size, places=(*pairs, *fixed))

    @property
    def plain(self) -> bool:
        """Return whether the layout is the model's own."""
        return self.places == tuple(range(self.size))

    def rows(self, weight: Array, heads: int) -> Array:
        """Arrange a projection to heads, [heads * head_size, …], for the kernel."""
        if self.plain:
            return weight
        before = weight.reshape(heads, len(self.places), *weight.shape[1:])
        after = np.zeros((heads, self.size, *weight.shape[1:]), weight.dtype)
        after[:, list(self.places)] = before
        return after.reshape(heads * self.size, *weight.shape[1:])

    def columns(self, weight: Array, heads: int) -> Array:
        """Arrange a projection from heads, [out, heads * head_size], for the kernel."""
        return weight if self.plain else np.ascontiguousarray(self.rows(np.ascontiguousarray(weight.T), heads).T)

    def frequencies(self, spec: DecoderSpec, kind: LayerKind) -> Array:
        """Return radians per position of each of the kernel's pairs, float64 [size / 2]."""
        found = np.zeros(self.size // 2)
        if kind.rotary is not None:
            plain = kind.rotary.frequencies(spec.head_size)
            found[: len(plain)] = plain
        return found

    def norm_factor(self) -> float:
        """Return the factor of a mean of squares over the kernel's channels relative to one over the model's."""
        return len(self.places) / self.size


def turning_channels(spec: DecoderSpec) -> int:
    """Return the number of rotated channels of a head; the same in every layer."""
    shares = {kind.rotary.share for kind in spec.layers if kind.rotary is not None}
    return 0 if not shares else int(spec.head_size * max(shares))


def arranged(spec: DecoderSpec, layout: HeadLayout, layer: dict[str, Array]) -> dict[str, Array]:
    """Return a layer's tensors with their heads in the kernel's layout."""
    found = dict(layer)
    for name, heads in (("q", spec.heads), ("k", spec.kv_heads), ("v", spec.kv_heads)):
        for part in (name, f"{name}.bias"):
            if part in found:
                found[part] = layout.rows(found[part], heads)
    found["o"] = layout.columns(found["o"], spec.heads)
    for name in ("q_norm", "k_norm"):
        if name in found:
            weight = (found[name] + spec.norm_offset) * np.sqrt(layout.norm_factor())
            found[name] = layout.rows(weight.astype(np.float32), 1)
    return found

"""Computes perplexity, divergence from the float model and top-token agreement, summed up sequence by sequence."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one compressed decoder.

    Attributes:
        perplexity, reference: perplexity of the compressed and of the float model, on the same tokens.
        kl: mean KL divergence of the compressed model's distribution from the float model's, nats per token.
        kl_error: standard error of ``kl`` over the sequences.
        agreement: share of positions whose most likely token is the float model's.
        tokens: number of evaluated positions.
    """

    perplexity: float
    reference: float
    kl: float
    kl_error: float
    agreement: float
    tokens: int

    @property
    def ratio(self) -> float:
        """Return the perplexity divided by the float model's."""
        return self.perplexity / self.reference


@dataclass
class Tally:
    """Sums over sequences, added in pieces of any number of positions."""

    nats: float = 0.0
    reference_nats: float = 0.0
    agreed: int = 0
    tokens: int = 0
    _kls: list[float] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)

    def begin(self) -> None:
        """Begin another sequence."""
        self._kls.append(0.0)
        self._counts.append(0)

    def add(self, logits: Array, reference: Array, targets: Array) -> None:
        """Add some positions.

        Args:
            logits, reference: float32 [positions, vocabulary].
            targets: the tokens that actually follow, int64 [positions].
        """
        own, true = log_softmax(logits), log_softmax(reference)
        rows = np.arange(len(targets))
        self.nats -= float(own[rows, targets].sum())
        self.reference_nats -= float(true[rows, targets].sum())
        self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.tokens += len(targets)
        self._kls[-1] += float((np.exp(true) * (true - own)).sum())
        self._counts[-1] += len(targets)

    def figures(self) -> Figures:
        """Return the figures of all positions added."""
        counts = np.array(self._counts, np.float64)
        means = np.array(self._kls) / np.maximum(counts, 1)
        kl = float(np.sum(self._kls) / self.tokens)
        spread = float(np.sqrt(((means - kl) ** 2 * counts).sum() / counts.sum() / max(1, len(counts) - 1)))
        return Figures(
            perplexity=math.exp(min(self.nats / self.tokens, 700.0)),
            reference=math.exp(min(self.reference_nats / self.tokens, 700.0)),
            kl=max(kl, 0.0),
            kl_error=spread,
            agreement=self.agreed / self.tokens,
            tokens=self.tokens,
        )


def log_softmax(logits: Array) -> Array:
    """Return the log-softmax along the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    found: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return found

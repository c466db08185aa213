"""Picks the next token from logits."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Options for picking tokens.

    Attributes:
        temperature: divisor of the logits; 0 picks the most likely token.
        top_k: pick only from this many most likely tokens; 0 for all.
        top_p: pick only from the most likely tokens whose probabilities add up to it; 1 for all.
        min_p: pick only tokens at least as likely as this share of the most likely one; 0 for all.
        repetition_penalty: divisor of the logits of tokens that already occur (a factor of negative logits); 1 for none
            (Keskar et al., "CTRL", 2019).
        seed: equal seeds give equal answers to equal prompts; None for a random one.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        numbers = (self.temperature, self.top_p, self.min_p, self.repetition_penalty)
        tests = (
            (all(math.isfinite(number) for number in numbers), "a number is not finite"),
            (self.temperature >= 0, "temperature is below 0"),
            (self.top_k >= 0, "top_k is below 0"),
            (0 < self.top_p <= 1, "top_p is not above 0 and up to 1"),
            (0 <= self.min_p <= 1, "min_p is not between 0 and 1"),
            (self.repetition_penalty > 0, "repetition_penalty is not above 0"),
            (isinstance(self.top_k, Integral), "top_k is no whole number"),
            (self.seed is None or isinstance(self.seed, Integral), "seed is no whole number"),
        )
        for holds, what in tests:
            if not holds:
                raise InputError(what, where="sampling")


def split(options: Mapping[str, Any]) -> tuple[Sampling, dict[str, Any]]:
    """Split a call's options into those of :class:`Sampling` and the others.

    Raises:
        InputError: an option is out of range or of the wrong type.
    """
    own = {one.name for one in fields(Sampling)}
    try:
        sampling = Sampling(**{name: value for name, value in options.items() if name in own})
    except TypeError as error:
        raise InputError(f"an option is no number: {error}", where="sampling") from error
    return sampling, {name: value for name, value in options.items() if name not in own}


class Sampler:
    """Picks the tokens of one answer."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(None if sampling.seed is None else abs(sampling.seed))

    def pick(self, logits: Array, seen: Collection[int]) -> int:
        """Pick the next token.

        Args:
            logits: float32 [vocabulary]; not modified.
            seen: tokens that already occur, for the repetition penalty.
        """
        how = self._sampling
        if how.repetition_penalty != 1 and seen:
            logits = logits.copy()
            at = np.fromiter(set(seen), np.int64)
            some = logits[at]
            logits[at] = np.where(some > 0, some / how.repetition_penalty, some * how.repetition_penalty)
        if how.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / how.temperature
        # The Gumbel-max trick (Yellott, 1977): each token has a noise of its own, so that logits which differ a little
        # (steps of other shapes give such) seldom lead to another token for the same seed.
        noise = -np.log(np.maximum(self._random.standard_exponential(len(scaled)), 1e-300))
        if how.top_k == 0 and how.top_p == 1 and how.min_p == 0:
            return int((scaled + noise).argmax())
        allowed = self._allowed(scaled)
        return int(allowed[(scaled[allowed] + noise[allowed]).argmax()])

    def _allowed(self, logits: Array) -> Array:
        """Return the tokens that may be picked, most likely first."""
        how = self._sampling
        if 0 < how.top_k < len(logits):
            kept = np.argpartition(-logits, how.top_k - 1)[: how.top_k]
        else:
            kept = np.arange(len(logits))
        order = kept[np.argsort(-logits[kept], kind="stable")]
        probabilities = np.exp(logits[order] - logits[order[0]])
        probabilities /= probabilities.sum()
        count = len(order)
        if how.top_p < 1:
            count = int(np.searchsorted(np.cumsum(probabilities), how.top_p)) + 1
        if how.min_p > 0:
            count = min(count, int((probabilities >= how.min_p * probabilities[0]).sum()))
        return order[: max(count, 1)]


def log_probabilities(logits: Array, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return a token's natural log-probability, and the ``top`` most likely tokens with theirs, most likely first."""
    shifted = logits.astype(np.float64) - float(logits.max())
    logs = shifted - math.log(float(np.exp(shifted).sum()))
    best: list[int] = []
    if top > 0:
        some = np.argpartition(-logs, min(top, len(logs)) - 1)[:top]
        best = some[np.argsort(-logs[some], kind="stable")].tolist()
    return float(logs[token]), [(one, float(logs[one])) for one in best]

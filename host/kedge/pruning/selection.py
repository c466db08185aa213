"""Chooses the channels to remove: from scores and a share to indices, within limits."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.pruning.groups import Group
from kedge_protocol.errors import ConfigError

Scores = npt.NDArray[np.float64]
Kept = dict[Group, int]
"""Number of channels left in each group."""
Allowed = Callable[[Group, float], int]
"""Number of channels left in a group if this many are wanted."""
Reached = Callable[[Kept], float]
"""Share that is gone, of whatever is counted."""


class Ranking(enum.Enum):
    """Among which channels the least important ones are sought."""

    LAYER = "layer"  # each layer loses the same share
    GLOBAL = "global"  # all layers together lose it


class Target(enum.Enum):
    """What the share refers to."""

    CHANNELS = "channels"
    OPERATIONS = "operations"  # multiply-accumulate operations, which latency follows


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits on what is left of a group.

    Attributes:
        multiple: the number left is a multiple of this if the group is large enough (vector units of processors hold 4,
            8 or 16 channels); of half of it if the group is smaller than twice as many, and so on.
        least: least number of channels left.
        most: largest share of a group that is removed.
    """

    multiple: int = 1
    least: int = 1
    most: float = 1.0

    def kept(self, size: int, first: int, wanted: float) -> int:
        """Return how many of ``size`` channels (``first`` before any pruning) are left if ``wanted`` are asked for."""
        step = max(1, self.multiple)
        while step > 1 and first < 2 * step:
            step //= 2
        lowest = max(1, min(first, self.least), int(np.ceil(first * (1 - self.most) - 1e-9)))
        lowest = min(size, -(-lowest // step) * step)
        return int(np.clip(round(wanted / step) * step, lowest, size))


def by_score(
    scores: Mapping[Group, Scores],
    allowed: Allowed,
    reached: Reached,
    ratio: float,
    own: Kept,
) -> Kept:
    """Return the numbers left after removing the lowest scores of all groups together, as many as needed.

    Args:
        own: groups whose number is already set.
    """
    every = np.sort(np.concatenate([values for group, values in scores.items() if group not in own] or [np.zeros(0)]))

    def left(count: int) -> Kept:
        bound = every[count - 1] if count else -np.inf
        return {
            group: own[group] if group in own else allowed(group, float((values > bound).sum()))
            for group, values in scores.items()
        }

    low, high = 0, len(every)
    while low < high:
        middle = (low + high) // 2
        if reached(left(middle)) >= ratio - 1e-9:
            high = middle
        else:
            low = middle + 1
    return left(low)


def by_harm(harm: Mapping[Group, Sequence[tuple[int, float]]], reached: Reached, ratio: float, own: Kept) -> Kept:
    """Return the numbers left after repeatedly shrinking the group that does the least harm for what it saves.

    Args:
        harm: for each group the numbers of channels that may be left, largest first, each with the outputs' error.
        own: groups whose number is already set.
    """
    kept: Kept = {group: group.size for group in harm} | own
    at = {group: -1 for group in harm if group not in own}
    while (now := reached(kept)) < ratio - 1e-9:
        best: tuple[float, Group, int] | None = None
        for group, place in at.items():
            before = harm[group][place][1] if place >= 0 else 0.0
            # A later step may be worth more than the next, where errors do not grow evenly.
            for further in range(place + 1, len(harm[group])):
                left, error = harm[group][further]
                won = reached({**kept, group: left}) - now
                if won <= 0:
                    continue
                # What goes beyond the share is worth nothing.
                price = max(0.0, error - before) / min(won, ratio - now)
                if best is None or price < best[0]:
                    best = (price, group, further)
        if best is None:
            break
        _, group, place = best
        at[group] = place
        kept[group] = harm[group][place][0]
    return kept


def lowest(scores: Mapping[Group, Scores], kept: Kept) -> dict[Group, list[int]]:
    """Return the least important channels of each group, all but the number that is left; among equals the last."""
    chosen = {}
    for group, values in scores.items():
        order = np.lexsort((-np.arange(group.size), values))
        chosen[group] = sorted(int(index) for index in order[: group.size - kept[group]])
    return chosen


def named(groups: Sequence[Group], ratios: Mapping[str, float], left_out: Sequence[str]) -> dict[Group, float]:
    """Return the shares of single groups, named by the nodes that produce their channels; zero for those left out.

    Raises:
        ConfigError: a named node makes no channels that could be cut, or a share is outside 0 to 1.
    """
    by_name = {name: group for group in groups for name in group.nodes}
    found: dict[Group, float] = {}
    wanted: dict[str, Any] = {**ratios, **dict.fromkeys(left_out, 0.0)}
    for name, ratio in wanted.items():
        if not 0 <= ratio < 1:
            raise ConfigError(f"the share {ratio} is not from 0 to below 1", where=f"layer {name!r}")
        if name not in by_name:
            if name in left_out:
                continue
            raise ConfigError(
                "makes no channels that could be cut",
                where=f"layer {name!r}",
                remedy=f"These do: {', '.join(sorted(by_name))}",
            )
        found[by_name[name]] = ratio
    return found

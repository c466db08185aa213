"""Knows the resources of the boards' chips (``boards.toml``), and checks whether a design fits."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol import codec, toml
from kedge_protocol.errors import CapacityError, TargetError
from kedge_targets.backends.finn.toolchain_client import Cost

_PATH = Path(__file__).parent / "boards.toml"

DEFAULT_UTILIZATION = 0.7
"""Default share of each resource that a design may use by the estimates. They count neither FIFOs nor the shell around
the design (DMA, interconnect), and above about three quarters of the LUTs timing closure becomes difficult."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """The resources of one board's chip.

    Attributes:
        part: the chip's part number.
        source: source of the numbers.
    """

    part: str
    source: str
    lut: int
    bram_18k: int
    uram: int
    dsp: int

    @property
    def capacity(self) -> dict[str, float]:
        """Return resource, as named in the estimates → available amount."""
        return {
            "LUT": float(self.lut),
            "BRAM_18K": float(self.bram_18k),
            "URAM": float(self.uram),
            "DSP": float(self.dsp),
        }

    def limits(self, utilization: float) -> dict[str, float]:
        """Return the largest amount of each that may be used."""
        return {name: utilization * count for name, count in self.capacity.items()}


@functools.cache
def boards() -> Mapping[str, Board]:
    """Return FINN's name of a board → the board."""
    return codec.structure(toml.read(_PATH, TargetError), dict[str, Board], where=_PATH.name, strict=True)


def board(name: str, *, where: str) -> Board:
    """Return a board by FINN's name.

    Raises:
        TargetError: its capacity is not known.
    """
    if name not in boards():
        raise TargetError(
            f"the capacity of board {name!r} is not known", where=where, remedy=f"Known are {', '.join(boards())}"
        )
    return boards()[name]


def require(
    fold: Cost,
    fastest: Cost,
    *,
    fits: bool,
    board_name: str,
    limits: Mapping[str, float],
    utilization: float,
    target_fps: float | None,
) -> None:
    """Check that a folding fits the board and reaches the requested speed.

    Args:
        fold: the folding with the requested speed, or the smallest possible.
        fastest: the fastest folding that fits.

    Raises:
        CapacityError: it does not; names the layer that takes most of the scarcest resource, or the slowest, and what
            is possible.
    """
    if not fits:
        raise _too_large(fold, fastest, board_name, limits, utilization, target_fps)
    if target_fps is not None and fold.frames_per_second < target_fps:
        slow = _layer(fold, fold.bottleneck)
        if slow.startswith("IODMA"):
            remedy = "The memory's port gives no more samples of this size: give smaller ones, or ask for less"
        else:
            remedy = f"Ask for at most {_rate(fastest)}, or make this layer smaller"
        raise CapacityError(
            f"{target_fps:.12g} frames a second cannot be reached on {board_name}: folded as far as FINN goes, this "
            f"layer takes {fold.max_cycles} cycles for a sample, which makes {_rate(fold)}",
            where=f"layer {slow!r}",
            remedy=remedy,
        )


def _too_large(
    fold: Cost,
    fastest: Cost,
    board_name: str,
    limits: Mapping[str, float],
    utilization: float,
    target_fps: float | None,
) -> CapacityError:
    over = {
        name: fold.total[name] / limits[name] if limits[name] else float("inf") for name in limits if fold.total[name]
    }
    short = max(over, key=lambda name: over[name])
    largest = max(fold.layers, key=lambda layer: layer.resources[short])
    possible = all(fastest.total[name] <= limits[name] for name in limits)
    wanted = "even its smallest folding" if target_fps is None or not possible else f"{target_fps:.12g} frames a second"
    what = (
        f"{wanted} takes {fold.total[short]:.0f} {short}, {board_name} has {limits[short] / utilization:.0f}, of which "
        f"{utilization:.0%} may be used; this layer alone takes {largest.resources[short]:.0f}"
    )
    if possible and target_fps is not None:
        remedy = f"Ask for at most {_rate(fastest)}, or take a larger board, fewer bits or a larger --max-utilization"
    else:
        remedy = "Take a larger board, fewer bits, a smaller network or a larger --max-utilization"
    return CapacityError(what, where=f"layer {largest.name!r}", remedy=remedy)


def _layer(cost: Cost, name: str) -> str:
    return next((layer.name for layer in cost.layers if layer.name == name), name)


def _rate(cost: Cost) -> str:
    # Downwards: what is named here can be asked for.
    return f"{int(cost.frames_per_second)} frames a second"

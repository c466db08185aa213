"""The plan of a staged rollout: which device is in which wave.

Devices are put in order by a hash of their names, target by target, so that the plan does not depend on the order in
which they come, and each wave is a stratified sample: it takes the wave's share of each target, and at least
``min_per_target`` of it, so that a fault of one target shows although that target is rare.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from kedge.fleet.staged.selectors import place
from kedge_protocol.errors import ConfigError

_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_COUNT = re.compile(r"\d{1,9}")


@dataclass(frozen=True)
class Size:
    """How far a wave reaches, from the first device on: a share of the fleet, or a number of devices."""

    share: Fraction | None = None
    count: int = 0

    def of(self, devices: int) -> Fraction:
        """Return its share of so many devices."""
        if self.share is not None:
            return self.share
        return min(Fraction(1), Fraction(self.count, devices)) if devices else Fraction(1)

    def __str__(self) -> str:
        return str(self.count) if self.share is None else f"{float(self.share * 100):g}%"


@dataclass(frozen=True, kw_only=True)
class Shortfall:
    """A wave that holds fewer devices of a target than it should, since earlier waves have the others."""

    wave: int
    target: str
    wanted: int
    devices: int


@dataclass(frozen=True, kw_only=True)
class WavePlan:
    """The plan.

    Attributes:
        waves: device → its target, wave by wave, each in the order in which its devices are told. No wave is empty.
        shortfalls: where a wave does not hold ``min_per_target`` devices of a target; waves count from 1.
    """

    waves: tuple[Mapping[str, str], ...]
    shortfalls: tuple[Shortfall, ...] = ()


def parse_size(text: str) -> Size:
    """Parse ``10%`` or ``40``.

    Raises:
        ConfigError: it is neither.
    """
    if found := _SHARE.fullmatch(text.strip()):
        share = Fraction(found[1]) / 100
        if 0 < share <= 1:
            return Size(share=share)
    elif _COUNT.fullmatch(text.strip()) and int(text) > 0:
        return Size(count=int(text))
    raise ConfigError(f"the wave {text!r} is neither a share such as 10% nor a number of devices")


def plan(devices: Mapping[str, str], sizes: Sequence[Size], *, min_per_target: int, seed: str = "") -> WavePlan:
    """Plan the waves.

    Args:
        devices: device → target.
        sizes: how far each wave reaches; each at least as far as the one before, the last over all devices.
        min_per_target: devices of each target in each wave, as long as there are any.
        seed: another one gives another order.
    """
    waves: list[dict[str, str]] = [{} for _ in sizes]
    shortfalls = []
    strata: dict[str, list[str]] = {}
    for name, target in devices.items():
        strata.setdefault(target, []).append(name)
    for target, names in sorted(strata.items()):
        names.sort(key=lambda name: (place(name, seed), name))
        begin = 0
        for index, size in enumerate(sizes):
            reach = len(names) if index == len(sizes) - 1 else math.ceil(size.of(len(devices)) * len(names))
            end = min(len(names), max(reach, begin + min_per_target))
            waves[index].update(dict.fromkeys(names[begin:end], target))
            if end - begin < min_per_target:
                shortfalls.append((index, target, end - begin))
            begin = end
    numbers = {index: number for number, index in enumerate((i for i, wave in enumerate(waves) if wave), 1)}
    return WavePlan(
        waves=tuple(_mixed(waves[index], seed) for index in numbers),
        shortfalls=tuple(
            Shortfall(wave=numbers[index], target=target, wanted=min_per_target, devices=count)
            for index, target, count in sorted(shortfalls)
            if index in numbers
        ),
    )


def _mixed(wave: Mapping[str, str], seed: str) -> dict[str, str]:
    """Order a wave by hash, so that its first devices are of all targets."""
    return {name: wave[name] for name in sorted(wave, key=lambda name: (place(name, seed), name))}

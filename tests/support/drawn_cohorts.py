"""Cohorts drawn at random, minute by minute, for proofs of the gates: devices with error rates of their own, bursts of
errors, and a day of calls before the switch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kedge.fleet.staged import effects, sequential
from kedge.fleet.staged.cohorts import CallFigures, CohortEvidence, DeviceCalls, Share
from kedge.fleet.staged.gates import GATES, Gates, Verdict, judge

EFFECT = 0.02
ALPHA = BETA = 0.05
FAULTY, BROKEN = 0.005, 0.3
"""Share of the devices that go bad by themselves, and how many more of their calls fail then."""


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a cohort is drawn.

    Attributes:
        devices, calls: devices, and calls of each a minute.
        rate: mean error rate of a good bundle.
        alike: larger means that devices are more alike: the sum of the parameters of the beta distribution that a
            device's rate is of.
        bursts: likewise of a minute's rate around its device's; the smaller, the more errors come together.
        before: minutes with the old bundle.
        minutes: with the new one, at most.
    """

    devices: int = 5
    calls: int = 6
    rate: float = 0.01
    alike: float = 300.0
    bursts: float = 60.0
    before: int = 1440
    minutes: int = 240

    @property
    def phi(self) -> float:
        """The dispersion of a minute's errors."""
        return 1 + (self.calls - 1) / (1 + self.bursts)

    def errors(self, draw: np.random.Generator, rates: np.ndarray, minutes: int) -> np.ndarray:
        """Draw errors, rollouts × devices × minutes, for the devices' rates."""
        shape = (*rates.shape, minutes)
        a = np.broadcast_to((rates * self.bursts)[..., None], shape)
        b = np.broadcast_to(((1 - rates) * self.bursts)[..., None], shape)
        return draw.binomial(self.calls, draw.beta(a, b))


@dataclass(frozen=True)
class Drawn:
    """Rollouts: errors before and after the switch, rollouts × devices × minutes."""

    drawing: Drawing
    before: np.ndarray
    after: np.ndarray

    def old(self, rollout: int) -> list[Share]:
        """Each device's calls with the old bundle."""
        return [whole(row, self.drawing.calls) for row in self.before[rollout]]

    def new(self, rollout: int) -> Iterator[list[Share]]:
        """Each device's calls with the new bundle, after each message: devices send once a minute, in turn."""
        shares = [Share()] * self.drawing.devices
        for minute in self.after[rollout].T:
            for device, bad in enumerate(minute):
                shares = list(shares)
                shares[device] = shares[device].with_block(self.drawing.calls, int(bad))
                yield shares


def whole(errors: np.ndarray, calls: int) -> Share:
    """The share of many minutes at once."""
    return Share(
        total=calls * len(errors),
        bad=int(errors.sum()),
        blocks=len(errors),
        squares=float((errors.astype(float) ** 2).sum() / calls),
    )


def draw(seed: int, rollouts: int, drawing: Drawing, *, rise: float, faulty: float = 0.0) -> Drawn:
    """Draw rollouts of a bundle that fails by ``rise`` more often than the one before; ``faulty`` is the share of the
    devices that go bad by themselves."""
    generator = np.random.default_rng(seed)
    shape = (rollouts, drawing.devices)
    rates = generator.beta(drawing.rate * drawing.alike, (1 - drawing.rate) * drawing.alike, shape)
    before = drawing.errors(generator, rates, drawing.before)
    after = rates + rise + BROKEN * (generator.random(shape) < faulty)
    return Drawn(drawing, before, drawing.errors(generator, np.minimum(0.99, after), drawing.minutes))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a test fared on rollouts of a good bundle, and as many of one that fails :data:`EFFECT` more often.

    Attributes:
        false_aborts, misses: rollouts.
        calls_good, calls_bad: calls until the decision, on average.
        fixed: calls of a test of a fixed number of them with the same alpha and beta, and the same protection.
    """

    rollouts: int
    false_aborts: int
    misses: int
    calls_good: float
    calls_bad: float
    fixed: float

    @property
    def ratio(self) -> float:
        """Calls to the decision, good and bad alike, by those of the fixed test."""
        return (self.calls_good + self.calls_bad) / 2 / self.fixed


Decide = Callable[[CallFigures, CallFigures], Verdict]
"""From the calls of the new and the old bundle."""


def by_test(seed: int, rollouts: int, drawing: Drawing) -> Outcome:
    """The sequential probability ratio test of all devices' calls with alpha = beta = 0.05."""

    def decide(new: CallFigures, old: CallFigures) -> Verdict:
        tested = effects.proportions(new, old, EFFECT)
        ends = sequential.boundaries(ALPHA, BETA, step=min(one.step for one in tested))
        ratio = sum(one.ratio for one in tested)
        if ends.lower < ratio < ends.upper:
            return Verdict.UNDECIDED
        return Verdict.FAIL if ratio > 0 else Verdict.PASS

    return _outcome(seed, rollouts, drawing, decide, faulty=0.0, fixed=fixed_calls(drawing))


def by_gate(seed: int, rollouts: int, drawing: Drawing) -> Outcome:
    """The gate as a rollout has it, were it the only one, with alpha = beta = 0.05, where devices go bad by themselves
    too; beside a single look at the same evidence."""
    gates = Gates(off=tuple(name for name in GATES if name != "error_rate"))

    def decide(new: CallFigures, old: CallFigures) -> Verdict:
        cohort = CohortEvidence(target="t", devices=drawing.devices, serving=drawing.devices, new=new, old=old)
        return judge(gates, (cohort,), soaked=False)[0].verdict

    fixed = fixed_calls_of_gate(seed + 2, rollouts, drawing)
    return _outcome(seed, rollouts, drawing, decide, faulty=FAULTY, fixed=fixed)


def _outcome(seed: int, rollouts: int, drawing: Drawing, decide: Decide, *, faulty: float, fixed: float) -> Outcome:
    wrong, calls = [], []
    for rise, right in ((0.0, Verdict.PASS), (EFFECT, Verdict.FAIL)):
        drawn = draw(seed + int(rise > 0), rollouts, drawing, rise=rise, faulty=faulty)
        ends = [_end(drawn, rollout, decide) for rollout in range(rollouts)]
        wrong.append(sum(verdict is not right for verdict, _ in ends))
        calls.append(sum(looks for _, looks in ends) / rollouts * drawing.calls)
    return Outcome(
        rollouts=rollouts,
        false_aborts=wrong[0],
        misses=wrong[1],
        calls_good=calls[0],
        calls_bad=calls[1],
        fixed=fixed,
    )


def _end(drawn: Drawn, rollout: int, decide: Decide) -> tuple[Verdict, int]:
    """The verdict, and after how many looks; undecided at the end is wrong either way."""
    old = _figures(drawn.old(rollout))
    looks = 0
    for looks, shares in enumerate(drawn.new(rollout), 1):
        verdict = decide(_figures(shares), old)
        if verdict is not Verdict.UNDECIDED:
            return verdict, looks
    return Verdict.UNDECIDED, looks


def _figures(shares: list[Share]) -> CallFigures:
    return CallFigures(
        devices=tuple(DeviceCalls(device=f"d{number}", calls=share) for number, share in enumerate(shares))
    )


def fixed_calls(drawing: Drawing) -> float:
    """The calls after which a single look tells a rise of :data:`EFFECT` with alpha = beta = 0.05, the rate before
    being known (J. Fleiss, "Statistical Methods for Rates and Proportions", 2003, ch. 4), with this dispersion."""
    low, high = drawing.rate, drawing.rate + EFFECT
    deviations = math.sqrt(low * (1 - low)) + math.sqrt(high * (1 - high))
    return drawing.phi * (1.6449 * deviations / EFFECT) ** 2


def fixed_calls_of_gate(seed: int, rollouts: int, drawing: Drawing) -> float:
    """The calls after which a single look at the gate's evidence errs with alpha = beta = 0.05.

    It is protected from faulty devices as the gate is, and its critical value is the best there is: the 95 % quantile
    of what good bundles show in as many rollouts.
    """
    minutes = min(drawing.minutes, math.ceil(4 * fixed_calls(drawing) / drawing.devices / drawing.calls))
    shown = []
    for rise in (0.0, EFFECT):
        drawn = draw(seed + int(rise > 0), rollouts, drawing, rise=rise, faulty=FAULTY)
        shown.append(np.array([_evidence(drawn, rollout, minutes) for rollout in range(rollouts)]))
    for minute in range(minutes):
        critical = np.quantile(shown[0][:, minute], 1 - ALPHA)
        if np.mean(shown[1][:, minute] <= critical) <= BETA:
            return float((minute + 1) * drawing.devices * drawing.calls)
    return float(minutes * drawing.devices * drawing.calls)


def _evidence(drawn: Drawn, rollout: int, minutes: int) -> list[float]:
    """The gate's evidence against a bundle, after each minute."""
    old, found = _figures(drawn.old(rollout)), []
    devices = drawn.drawing.devices
    for shares in itertools.islice(drawn.new(rollout), devices - 1, minutes * devices, devices):
        ratios = [one.ratio for one in effects.proportions(_figures(shares), old, EFFECT)]
        found.append(sequential.combined(ratios, faulty=FAULTY, bound=-math.log(ALPHA)))
    return found


def interval(count: int, total: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (E. B. Wilson, 1927)."""
    share, z = count / total, 1.96
    center = (share + z * z / 2 / total) / (1 + z * z / total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / 4 / total**2) / (1 + z * z / total)
    return center - margin, center + margin

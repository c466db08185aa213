"""Gates: what the evidence of a rollout says of each target, with the error probabilities that the policy asks for.

**False aborts.** ``Gates.alpha`` holds for the whole rollout: over all gates, all targets and every look. It is shared
equally by gates and targets (Bonferroni), and holds over all looks since every test is sequential, see
:mod:`kedge.fleet.staged.sequential`. It holds for devices too that go bad by themselves while the rollout runs
(``faulty_share``): what one device can say is bounded, and dearer than it would be without them. Hence a gate never
fails by one device that the others contradict.

**Misses.** ``Gates.beta`` is of each gate and target: the probability that it passes, by chance, what is as bad as the
limit. What one device says for a release is bounded too.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kedge.fleet.staged import effects, sequential
from kedge.fleet.staged.cohorts import CallFigures, CohortEvidence, DriftFigures, ShadowFigures
from kedge.fleet.staged.effects import Measured
from kedge_protocol.errors import ConfigError

__all__ = [
    "GATES",
    "CallFigures",
    "CohortEvidence",
    "DriftFigures",
    "GateResult",
    "Gates",
    "Method",
    "ShadowFigures",
    "Verdict",
    "judge",
]

CONFIDENCE_95 = 1.96
FIRST_TOKEN = "first_token_ratio"
MEASURED = {
    "error_rate": 1.0,
    "p95_ratio": 0.0,
    "p99_ratio": 0.0,
    "memory_per_minute": 0.0,
    "agreement": 1.0,
    "drift": 0.0,
}
"""The gates on what devices measure, with the largest step of the evidence by which their bounds may be moved; the
others count devices."""
_CERTAIN = 1e6
"""A log-likelihood ratio beyond all doubt."""


class Verdict(str, enum.Enum):
    """What a gate says."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"


class Method(str, enum.Enum):
    """How a gate decides."""

    SEQUENTIAL = "sequential"  # as early as the evidence allows, with stated error probabilities
    FIXED = "fixed"  # by the figure alone, once there are ``min_calls`` calls


@dataclass(frozen=True, kw_only=True)
class Gates:
    """The limits of a rollout. None turns a gate off, as ``off`` does.

    Attributes:
        method: of the gates on measurements; those that count devices are sequential always.
        off: gates that are off, by the names below.
        alpha: probability that a good release is aborted, over all gates, targets and looks of a rollout.
        beta: probability, of each gate and target, of passing a release that is as bad as the limit.
        faulty_share: share of the devices that go bad by themselves while a rollout runs.
        min_calls: calls of a cohort before a fixed threshold decides.
        golden: share of devices whose golden vectors may refuse a good bundle.
        failures: share of devices on which an update may fail otherwise.
        silence: share of devices that may be silent; where more of the control is, as many as there.
        silent_most: once the soak is over for good (``max_soak``), more silent devices than this share fail, and fewer
            are left out.
        served: share of the serving devices that must attest that this bundle answered.
        error_rate: share of calls that fail more than with the old bundle.
        p95_ratio, p99_ratio: latency as a ratio to the old bundle's; of a language model, of one token.
        first_token_ratio: of a language model, the time to the first token (p95) as a ratio to the old bundle's.
        memory_per_minute: bytes.
        temperature: °C that a device may reach that did not before; and 5 °C more than before.
        agreement: share of shadowed inputs that both bundles answer alike.
        drift: population stability index of outputs and confidence above the old bundle's.
    """

    method: Method = Method.SEQUENTIAL
    off: tuple[str, ...] = ()
    alpha: float = 0.05
    beta: float = 0.05
    faulty_share: float = 0.005
    min_calls: int = 200
    golden: float | None = 0.0005
    failures: float | None = 0.05
    silence: float | None = 0.1
    silent_most: float = 0.5
    served: float | None = 0.9
    error_rate: float | None = 0.02
    p95_ratio: float | None = 1.25
    p99_ratio: float | None = 1.25
    first_token_ratio: float | None = 1.5
    memory_per_minute: float | None = 512_000.0
    temperature: float | None = 85.0
    agreement: float | None = 0.95
    drift: float | None = 0.25

    def check(self) -> None:
        """Check the values.

        Raises:
            ConfigError: one is out of its range.
        """
        shares = {"alpha", "beta", "faulty_share", "golden", "failures", "silence", "silent_most", "served"}
        shares |= {"error_rate", "agreement"}
        for name, value in vars(self).items():
            if name in ("method", "off", "min_calls") or value is None:
                continue
            number = float(value)
            whole = name == "served"
            if name in shares and not (0 < number < 1 or (whole and number == 1)):
                raise ConfigError(f"gates.{name} is {value}", remedy="Give a share above 0 and below 1")
            if name.endswith("_ratio") and not number > 1:
                raise ConfigError(f"gates.{name} is {value}", remedy="Give a ratio above 1, such as 1.25")
            if not (math.isfinite(number) and number > 0):
                raise ConfigError(f"gates.{name} is {value}", remedy="Give a finite number above 0")
        if unknown := sorted(set(self.off) - set(GATES)):
            raise ConfigError(f"gates.off names {unknown[0]}", remedy=f"There are {', '.join(GATES)}")
        if self.min_calls < 1:
            raise ConfigError(f"gates.min_calls is {self.min_calls}", remedy="Give 1 or more")


@dataclass(frozen=True, kw_only=True)
class GateResult:
    """What one gate says of one target.

    Attributes:
        figure: in the limit's unit; None if nothing was measured.
        limit: as the policy has it.
        low, high: 95 % interval of ``figure``; None where it has none.
        samples: what ``figure`` is of: calls, devices, or blocks of time.
        detail: in words.
    """

    gate: str
    target: str
    verdict: Verdict
    figure: float | None
    limit: float
    low: float | None = None
    high: float | None = None
    samples: int
    detail: str


def judge(
    gates: Gates, cohorts: Sequence[CohortEvidence], *, soaked: bool, waited: bool = False
) -> tuple[GateResult, ...]:
    """Judge the evidence so far.

    Args:
        gates: the limits.
        cohorts: one for each target of the rollout, also where no wave has reached it yet: the error probabilities are
            shared by all of them.
        soaked: whether the wave's soak time is over. Before, a gate passes only where its test decides; after, also
            where nothing can be measured, or the evidence is rather for the release than against it.
        waited: whether it is over for good: silent devices are awaited no longer.

    Returns:
        The results by target, then gate. A gate that is still undecided may decide with more evidence.
    """
    on = {name: gate for name, gate in _JUDGES.items() if name not in gates.off}
    wanted = [(name, limit, gate) for name, gate in on.items() if (limit := getattr(gates, name)) is not None]
    level = _level(gates, len(cohorts), text=any(cohort.writes_text for cohort in cohorts))
    results = []
    for cohort in cohorts:
        if cohort.devices:
            found = (gate(_Asked(gates, cohort, level, soaked, waited, name, limit)) for name, limit, gate in wanted)
            results += [result for result in found if result is not None]
    return tuple(results)


def _level(gates: Gates, targets: int, *, text: bool = False) -> float:
    """Return the share of ``Gates.alpha`` of one gate on one target.

    Args:
        text: whether a language model is judged, of which there is a gate more.
    """
    count = sum(
        name not in gates.off and getattr(gates, name) is not None for name in _JUDGES if text or name != FIRST_TOKEN
    )
    return gates.alpha / max(1, targets) / max(1, count)


def powerless(gates: Gates, sizes: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Return the targets that have devices, and too few for some gates on measurements to fail, whatever they measure:
    so few may be faulty by themselves. Target → these gates.

    Args:
        sizes: target → its devices; those without any share the error probabilities too.
    """
    if gates.method is Method.FIXED:
        return {}
    found: dict[str, list[str]] = {}
    for name, step in MEASURED.items():
        if name in gates.off or getattr(gates, name) is None:
            continue
        bound = sequential.boundaries(_level(gates, len(sizes)), gates.beta, step=step).upper
        for target, devices in sizes.items():
            most = sequential.combined([_CERTAIN] * devices, faulty=gates.faulty_share, bound=bound)
            if devices and most < bound:
                found.setdefault(target, []).append(name)
    return {target: tuple(names) for target, names in sorted(found.items())}


@dataclass(frozen=True)
class _Asked:
    """One gate on one cohort; ``level`` is its share of ``Gates.alpha``."""

    gates: Gates
    cohort: CohortEvidence
    level: float
    soaked: bool
    waited: bool
    name: str
    limit: float

    def result(self, verdict: Verdict, figure: float | None, samples: int, detail: str) -> GateResult:
        return GateResult(
            gate=self.name,
            target=self.cohort.target,
            verdict=verdict,
            figure=figure,
            limit=self.limit,
            samples=samples,
            detail=detail,
        )

    def undecided(self, passes: bool) -> Verdict:
        return Verdict.PASS if self.soaked and passes else Verdict.UNDECIDED


def _counted(asked: _Asked, count: int, total: int, words: str, *, allowed: float, settled: bool) -> GateResult:
    evidence = sequential.count_evidence(count, total, allowed) if total else 0.0
    bound = -math.log(asked.level)
    figure = count / total if total else None
    verdict = Verdict.FAIL if evidence >= bound else Verdict.PASS if settled else asked.undecided(total > 0)
    return asked.result(verdict, figure, total, f"{count} of {total} {words}")


def _golden(asked: _Asked) -> GateResult:
    cohort = asked.cohort
    judged = cohort.serving + cohort.proof_failed
    settled = cohort.serving + cohort.failed >= cohort.devices
    words = "devices refused it by their golden vectors"
    return _counted(asked, cohort.proof_failed, judged, words, allowed=asked.limit, settled=settled)


def _failures(asked: _Asked) -> GateResult:
    cohort = asked.cohort
    count, total = cohort.failed - cohort.proof_failed, cohort.serving + cohort.failed
    settled = total >= cohort.devices
    return _counted(asked, count, total, "devices failed otherwise", allowed=asked.limit, settled=settled)


def _silence(asked: _Asked) -> GateResult:
    cohort = asked.cohort
    allowed = asked.limit
    if cohort.control_devices:
        # A network that is away takes both groups along.
        of_control = (cohort.control_silent + 1) / (cohort.control_devices + 2)
        allowed = min(0.95, max(allowed, of_control))
    settled = cohort.serving + cohort.failed >= cohort.devices
    # So few devices of a first wave are no share: one of seven is above a tenth, and says nothing of the release.
    few = asked.soaked and (
        cohort.silent <= asked.limit * cohort.devices
        or sequential.count_evidence(cohort.silent, cohort.devices, asked.limit) <= 0
    )
    words = f"devices are silent, {cohort.control_silent} of {cohort.control_devices} of the control"
    found = _counted(asked, cohort.silent, cohort.devices, words, allowed=allowed, settled=settled or few)
    if found.verdict is not Verdict.FAIL and not (settled or few) and asked.waited:
        return _without_silent(asked, found)
    if found.verdict is Verdict.PASS and not (settled or few):
        return asked.result(Verdict.UNDECIDED, found.figure, found.samples, found.detail)
    return found


def _without_silent(asked: _Asked, found: GateResult) -> GateResult:
    """Decide for good: nobody waits for ever for a few devices, nor goes on where most of them say nothing."""
    cohort, most = asked.cohort, asked.gates.silent_most
    if cohort.control_silent > most * cohort.control_devices:
        return asked.result(Verdict.UNDECIDED, found.figure, found.samples, found.detail)
    if cohort.silent > most * cohort.devices:
        return asked.result(Verdict.FAIL, found.figure, found.samples, f"{found.detail}: more than {most:.0%}")
    detail = f"{found.detail}; they are left out, {cohort.serving + cohort.failed} have answered"
    return asked.result(Verdict.PASS, found.figure, found.samples, detail)


def _served(asked: _Asked) -> GateResult:
    cohort = asked.cohort
    if not cohort.serving:
        return asked.result(Verdict.UNDECIDED, None, 0, "no device serves it yet")
    if cohort.served_by_calls is None and cohort.served_by_golden is None:
        detail = "the agents do not say what they served"
        return asked.result(asked.undecided(True), None, cohort.serving, detail)
    calls, golden = cohort.served_by_calls or 0, cohort.served_by_golden or 0
    share = (calls + golden) / cohort.serving
    detail = f"devices that answered with it: {calls} calls of users, {golden} golden samples at the served endpoint"
    verdict = Verdict.PASS if share >= asked.limit else Verdict.UNDECIDED
    return asked.result(verdict, share, cohort.serving, detail)


def _tested(asked: _Asked, measured: Measured, *, alternative: float) -> GateResult:
    """Judge one effect a device."""
    if not measured.effects:
        return asked.result(asked.undecided(not measured.pending), None, 0, measured.nothing)
    whole = sequential.pooled(measured.effects)
    margin = CONFIDENCE_95 * math.sqrt(whole.variance)
    if asked.gates.method is Method.FIXED:
        verdict, detail = _by_figure(asked, measured, whole.estimate > alternative), measured.detail
    else:
        verdict, detail = _by_evidence(asked, measured, alternative)
    return GateResult(
        gate=asked.name,
        target=asked.cohort.target,
        verdict=verdict,
        figure=measured.shown(whole.estimate),
        limit=asked.limit,
        low=min(measured.shown(whole.estimate - margin), measured.shown(whole.estimate + margin)),
        high=max(measured.shown(whole.estimate - margin), measured.shown(whole.estimate + margin)),
        samples=measured.samples,
        detail=detail,
    )


def _by_figure(asked: _Asked, measured: Measured, is_over: bool) -> Verdict:
    if asked.cohort.new.inferences < asked.gates.min_calls:
        return asked.undecided(False)
    return Verdict.FAIL if is_over else asked.undecided(True)


def _by_evidence(asked: _Asked, measured: Measured, alternative: float) -> tuple[Verdict, str]:
    faulty = asked.gates.faulty_share
    ends = sequential.boundaries(asked.level, asked.gates.beta, step=measured.step)
    against, support = ends.upper, -ends.lower
    ratios = measured.ratios
    if ratios is None:
        ratios = [sequential.log_ratio(effect, 0.0, alternative) for effect in measured.effects]
    bad = sequential.combined(ratios, faulty=faulty, bound=against)
    # A device that goes bad does not speak for the release: its price is owed on the other side only.
    good = sequential.combined([-ratio for ratio in ratios], faulty=faulty, bound=support, priced=False)
    detail = f"{measured.detail}; evidence {bad:.1f} of {against:.1f} against it, {good:.1f} of {support:.1f} for it"
    if bad >= against:
        return Verdict.FAIL, detail
    if good >= support:
        return Verdict.PASS, detail
    return asked.undecided(good > bad), detail


def _error_rate(asked: _Asked) -> GateResult:
    measured = effects.error_rates(asked.cohort, asked.limit)
    return _tested(asked, measured, alternative=asked.limit)


def _latency(quantile: str) -> Callable[[_Asked], GateResult]:
    def gate(asked: _Asked) -> GateResult:
        return _tested(asked, effects.latencies(asked.cohort, quantile), alternative=math.log(asked.limit))

    return gate


def _first_token(asked: _Asked) -> GateResult | None:
    if not asked.cohort.writes_text:
        return None
    return _tested(asked, effects.latencies(asked.cohort, "first"), alternative=math.log(asked.limit))


def _memory(asked: _Asked) -> GateResult:
    return _tested(asked, effects.memory(asked.cohort), alternative=asked.limit)


def _temperature(asked: _Asked) -> GateResult:
    hot, total, highest = effects.hot_devices(asked.cohort, asked.limit)
    if not total:
        return asked.result(asked.undecided(True), None, 0, "no device measures it")
    # Too hot is a fault of a device unless it is of several.
    found = _counted(
        asked, hot, total, "devices became too hot", allowed=asked.gates.faulty_share, settled=asked.soaked
    )
    return asked.result(found.verdict, highest, total, found.detail)


def _agreement(asked: _Asked) -> GateResult | None:
    if asked.cohort.shadow is None:
        return None
    measured = effects.disagreement(asked.cohort.shadow, 1 - asked.limit)
    if not measured.effects:
        return asked.result(Verdict.UNDECIDED, None, 0, measured.nothing)
    return _tested(asked, measured, alternative=(1 - asked.limit) / 2)


def _drift(asked: _Asked) -> GateResult | None:
    if asked.cohort.drift is None:
        return None
    return _tested(asked, effects.drifts(asked.cohort.drift, asked.limit), alternative=asked.limit)


_JUDGES: dict[str, Callable[[_Asked], GateResult | None]] = {
    "golden": _golden,
    "failures": _failures,
    "silence": _silence,
    "served": _served,
    "error_rate": _error_rate,
    "p95_ratio": _latency("p95"),
    "p99_ratio": _latency("p99"),
    FIRST_TOKEN: _first_token,
    "memory_per_minute": _memory,
    "temperature": _temperature,
    "agreement": _agreement,
    "drift": _drift,
}
GATES = tuple(_JUDGES)
"""Names of all gates."""

"""Gates judge cohorts by what their devices measured: early, per device, and never by one faulty device."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
from tests.support.drawn_cohorts import interval

from kedge.fleet.staged import sequential
from kedge.fleet.staged.cohorts import (
    CallFigures,
    CohortEvidence,
    DeviceCalls,
    DeviceMemory,
    DeviceShadow,
    DeviceTemperature,
    ShadowFigures,
    Share,
    Spread,
)
from kedge.fleet.staged.gates import MEASURED, GateResult, Gates, Method, Verdict, judge, powerless
from kedge_protocol.errors import ConfigError

BLOCKS = 10
TARGETS = 7


def shares(seed: int, rates: list[float], *, calls: int = 60, blocks: int = BLOCKS) -> list[Share]:
    """One device a rate: so many calls in each block."""
    draw = random.Random(seed)
    found = []
    for rate in rates:
        share = Share()
        for _ in range(blocks):
            share = share.with_block(calls, sum(draw.random() < rate for _ in range(calls)))
        found.append(share)
    return found


def spreads(seed: int, means_ms: list[float], *, blocks: int = BLOCKS) -> list[Spread]:
    draw = random.Random(seed)
    found = []
    for mean in means_ms:
        spread = Spread()
        for _ in range(blocks):
            spread = spread.with_value(math.log(mean) + draw.gauss(0, 0.1))
        found.append(spread)
    return found


def figures(calls: list[Share], latency: list[Spread]) -> CallFigures:
    pairs = zip(calls, latency, strict=True)
    return CallFigures(
        devices=tuple(
            DeviceCalls(device=f"d{number}", calls=share, p95=spread, p99=spread)
            for number, (share, spread) in enumerate(pairs)
        )
    )


def cohort(
    seed: int = 0,
    *,
    target: str = "t0",
    errors: list[float] | None = None,
    latency: list[float] | None = None,
    **values: object,
) -> CohortEvidence:
    """Five devices that are well, but for what is given."""
    errors = errors or [0.01] * 5
    count = len(errors)
    latency = latency or [10.0] * count
    base: dict[str, object] = {
        "target": target,
        "devices": count,
        "serving": count,
        "served_by_calls": count,
        "served_by_golden": 0,
        "new": figures(shares(seed, errors), spreads(seed, latency)),
        "old": figures(shares(seed + 1, [0.01] * count), spreads(seed + 1, [10.0] * count)),
    }
    return CohortEvidence(**(base | values))  # type: ignore[arg-type]


def verdicts(bad: CohortEvidence, *, soaked: bool = False, gates: Gates | None = None) -> dict[str, GateResult]:
    """The results of one cohort beside six that are well."""
    others = [cohort(number, target=f"t{number}") for number in range(1, TARGETS)]
    found = judge(gates or Gates(), (bad, *others), soaked=soaked)
    assert {result.verdict for result in found if result.target != bad.target} <= {Verdict.PASS, Verdict.UNDECIDED}
    return {result.gate: result for result in found if result.target == bad.target}


def test_a_good_cohort_passes_every_gate_once_it_has_soaked() -> None:
    found = verdicts(cohort(), soaked=True)
    assert {result.verdict for result in found.values()} == {Verdict.PASS}
    assert {"golden", "error_rate", "p95_ratio", "p99_ratio", "served", "silence"} <= found.keys()


def test_a_good_cohort_passes_calls_and_latency_before_the_soak_is_over() -> None:
    found = verdicts(cohort())
    assert found["error_rate"].verdict is found["p99_ratio"].verdict is Verdict.PASS


@pytest.mark.parametrize(
    ("gate", "bad"),
    [
        ("golden", cohort(serving=0, failed=5, proof_failed=5)),
        ("failures", cohort(serving=0, failed=5)),
        ("error_rate", cohort(errors=[0.08] * 5)),
        ("p95_ratio", cohort(latency=[15.0] * 5)),
        ("p99_ratio", cohort(latency=[15.0] * 5)),
        (
            "memory_per_minute",
            cohort(
                memory_slope=tuple(
                    DeviceMemory(device=f"d{n}", new=1e6, old=0.0, variance=1e10, points=8) for n in range(5)
                )
            ),
        ),
        (
            "temperature",
            cohort(temperature_c=tuple(DeviceTemperature(device=f"d{n}", new=91.0, old=60.0) for n in range(5))),
        ),
        (
            "agreement",
            cohort(
                shadow=ShadowFigures(
                    devices=tuple(
                        DeviceShadow(device=f"d{n}", compared=share, classes={"cat": (60, 5), "dog": (540, 535)})
                        for n, share in enumerate(shares(3, [0.1] * 5))
                    )
                )
            ),
        ),
        ("silence", cohort(serving=0, silent=5, control_devices=200, control_silent=4)),
    ],
)
def test_each_gate_fails_what_it_is_for_before_the_soak_is_over(gate: str, bad: CohortEvidence) -> None:
    found = verdicts(bad)
    assert found[gate].verdict is Verdict.FAIL, found[gate]
    assert not [name for name, result in found.items() if result.verdict is Verdict.FAIL and name[:2] != gate[:2]]


def test_one_faulty_device_of_five_decides_nothing() -> None:
    for bad in (
        cohort(errors=[1.0, 0.01, 0.01, 0.01, 0.01]),
        cohort(latency=[500.0, 10.0, 10.0, 10.0, 10.0]),
        cohort(serving=4, failed=1, proof_failed=1),
    ):
        assert Verdict.FAIL not in {result.verdict for result in verdicts(bad, soaked=True).values()}


def test_bursts_of_errors_count_less_than_as_many_single_ones() -> None:
    """What comes in bursts before the switch too is noise."""

    def with_bursts(seed: int) -> list[Share]:
        draw = random.Random(seed)
        found = []
        for _ in range(5):
            share = Share()
            for _ in range(BLOCKS):
                share = share.with_block(60, 30 if draw.random() < 0.08 else 0)
            found.append(share)
        return found

    aborted = 0
    for seed in range(100):
        bursts = figures(with_bursts(seed), spreads(seed, [10.0] * 5))
        before = figures(with_bursts(seed + 1000), spreads(seed + 1, [10.0] * 5))
        aborted += verdicts(cohort(new=bursts, old=before))["error_rate"].verdict is Verdict.FAIL
    assert aborted <= 1


def test_one_silent_device_of_a_small_cohort_does_not_hold_a_wave_whose_soak_is_over() -> None:
    """One of seven is above a tenth, and so many are seen where a tenth is silent; two of five are too many."""
    for serving, silent, expected in ((6, 1, Verdict.PASS), (4, 1, Verdict.PASS), (3, 2, Verdict.UNDECIDED)):
        one = cohort(errors=[0.01] * serving, devices=serving + silent, silent=silent, control_devices=200)
        assert verdicts(one, soaked=True)["silence"].verdict is expected
        assert verdicts(one)["silence"].verdict is Verdict.UNDECIDED


def test_a_wave_does_not_wait_for_silent_devices_for_ever() -> None:
    """With the soak at its end for good: most of a small cohort has answered, or most of it is silent."""
    for serving, silent, expected in ((3, 2, Verdict.PASS), (1, 1, Verdict.PASS), (2, 1, Verdict.PASS),
                                      (1, 2, Verdict.FAIL), (0, 1, Verdict.FAIL)):  # fmt: skip
        one = cohort(errors=[0.01] * serving, devices=serving + silent, serving=serving, silent=silent)
        found = {result.gate: result for result in judge(Gates(), [one], soaked=True, waited=True)}["silence"]
        assert found.verdict is expected, (serving, silent)
        assert ("left out" in found.detail) == (expected is Verdict.PASS)
    strict = {one.gate: one for one in judge(Gates(silent_most=0.2), [cohort(errors=[0.01] * 3, devices=5, silent=2)],
                                             soaked=True, waited=True)}  # fmt: skip
    assert strict["silence"].verdict is Verdict.FAIL
    # Where the control is as silent, the network is away.
    away = cohort(errors=[0.01], devices=3, silent=2, control_devices=10, control_silent=9)
    found = {result.gate: result for result in judge(Gates(), [away], soaked=True, waited=True)}["silence"]
    assert found.verdict is Verdict.UNDECIDED


def test_gates_that_too_few_devices_cannot_fail_are_named_and_only_those() -> None:
    """Whatever the devices measure: named gates never fail, and the others do."""
    for targets in (1, 3, 7):
        for devices in (1, 2, 3, 5, 20):
            sizes = {f"t{number}": devices if number == 0 else 200 for number in range(targets)}
            named = powerless(Gates(), sizes).get("t0", ())
            hopeless = cohort(errors=[0.9] * devices, latency=[500.0] * devices)
            others = [CohortEvidence(target=f"t{number}") for number in range(1, targets)]
            found = {one.gate: one for one in judge(Gates(), [hopeless, *others], soaked=True)}
            for gate in ("error_rate", "p99_ratio"):
                fails = found[gate].verdict is Verdict.FAIL
                assert fails == (gate not in named), (targets, devices, gate)
    assert "p99_ratio" in powerless(Gates(), {"rpi4": 1, "rpi5": 0})["rpi4"]
    assert powerless(Gates(), {"rpi4": 50, "rpi5": 0}) == {}
    assert powerless(Gates(method=Method.FIXED), {"rpi4": 1}) == {}
    assert powerless(Gates(off=tuple(MEASURED)), {"rpi4": 1}) == {}


def test_silence_of_the_whole_network_is_not_held_against_the_release() -> None:
    found = verdicts(cohort(serving=2, silent=3, control_devices=200, control_silent=110), soaked=True)
    assert found["silence"].verdict is Verdict.UNDECIDED


def test_what_is_not_measured_passes_when_the_soak_is_over_and_waits_before() -> None:
    nothing = cohort(new=CallFigures(), old=CallFigures())
    before, after = verdicts(nothing), verdicts(nothing, soaked=True)
    for gate in ("error_rate", "p99_ratio", "memory_per_minute", "temperature"):
        assert before[gate].verdict is Verdict.UNDECIDED
        assert (after[gate].verdict, after[gate].figure, after[gate].samples) == (Verdict.PASS, None, 0)


def test_a_cohort_that_serves_without_an_answer_waits() -> None:
    found = verdicts(cohort(served_by_calls=0, served_by_golden=0), soaked=True)
    assert found["served"].verdict is Verdict.UNDECIDED


def test_fixed_thresholds_decide_by_the_figure_once_there_are_calls_enough() -> None:
    gates = Gates(method=Method.FIXED)
    assert verdicts(cohort(errors=[0.05] * 5), gates=gates)["error_rate"].verdict is Verdict.FAIL
    assert verdicts(cohort(), gates=gates)["error_rate"].verdict is Verdict.UNDECIDED
    assert verdicts(cohort(), gates=gates, soaked=True)["error_rate"].verdict is Verdict.PASS


def test_a_gate_that_is_off_says_nothing() -> None:
    gates = Gates(error_rate=None, off=("p99_ratio",))
    gates.check()
    assert not {"error_rate", "p99_ratio"} & verdicts(cohort(errors=[0.5] * 5), gates=gates).keys()


def test_the_figure_lies_in_its_interval_and_has_the_limits_unit() -> None:
    found = verdicts(cohort(errors=[0.08] * 5, latency=[15.0] * 5))
    for gate, about in (("error_rate", 0.07), ("p99_ratio", 1.5)):
        result = found[gate]
        assert result.low is not None and result.high is not None  # noqa: PT018
        assert result.figure is not None
        assert result.low < result.figure < result.high
        assert result.figure == pytest.approx(about, rel=0.25)


@pytest.mark.parametrize(
    "wrong",
    [
        {"off": ("p98_ratio",)},
        {"alpha": 0.0},
        {"error_rate": 1.5},
        {"p99_ratio": 0.9},
        {"memory_per_minute": math.nan},
        {"min_calls": 0},
    ],
)
def test_limits_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(Gates(), **wrong).check()  # type: ignore[arg-type]
    Gates().check()


def test_evidence_of_a_count_is_a_likelihood_ratio_with_mean_one() -> None:
    """Under the allowed share its mean is 1: so the probability that it exceeds 1/alpha is at most alpha."""
    share, total = 0.1, 12
    chances = [math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(total + 1)]
    ratios = [math.exp(sequential.count_evidence(k, total, share)) for k in range(total + 1)]
    mean = sum(chance * ratio for chance, ratio in zip(chances, ratios, strict=True))
    assert mean == pytest.approx(1.0, abs=1e-9) or mean < 1.0
    assert ratios == sorted(ratios)


@pytest.mark.parametrize("devices", [2, 5, 20])
def test_faulty_devices_are_reckoned_with_in_the_stated_probability(devices: int) -> None:
    """Devices that are faulty by themselves say that the bundle is as bad as can be, from the first look on."""
    draw = random.Random(f"faulty {devices}")
    faulty, bound, crossed, rollouts = 0.05, -math.log(0.05), 0, 300
    for _ in range(rollouts):
        broken = [draw.random() < faulty for _ in range(devices)]
        ratios = [0.0] * devices
        for _ in range(40):
            ratios = [
                1e3 if is_broken else ratio + draw.gauss(-0.1, math.sqrt(0.2))
                for ratio, is_broken in zip(ratios, broken, strict=True)
            ]
            if sequential.combined(ratios, faulty=faulty, bound=bound) >= bound:
                crossed += 1
                break
    assert interval(crossed, rollouts)[0] <= 0.05, crossed


def test_no_device_decides_alone_where_two_contradict_it_and_several_decide() -> None:
    bound = -math.log(0.05 / TARGETS / 10)
    assert sequential.combined([1e3, -1e3, -1e3], faulty=0.005, bound=bound) < 1
    assert sequential.combined([1e3], faulty=0.005, bound=bound) < bound
    assert sequential.combined([1e3] * 3, faulty=0.005, bound=bound) >= bound
    assert sequential.combined([1e3] * 5 + [-1e3], faulty=0.005, bound=bound) >= bound


def test_what_one_device_may_say_falls_as_devices_come() -> None:
    """So evidence that grows by devices never gains by another cap."""
    for faulty in (0.0005, 0.005, 0.05):
        for bound in (3.0, 7.3, 12.0):
            caps = [sequential.cap_of_device(devices, faulty, bound) for devices in (5, 8, 13, 40, 128, 500)]
            assert caps == sorted(caps, reverse=True)


def _writing(token_ms: float, first_ms: float, seed: int) -> CallFigures:
    """Five devices with a language model."""
    tokens, firsts = spreads(seed, [token_ms] * 5), spreads(seed + 50, [first_ms] * 5)
    pairs = zip(shares(seed, [0.01] * 5), tokens, firsts, strict=True)
    return CallFigures(
        devices=tuple(
            DeviceCalls(device=f"d{number}", calls=calls, p95=token, p99=token, first=first)
            for number, (calls, token, first) in enumerate(pairs)
        )
    )


@pytest.mark.parametrize(
    ("token_ms", "first_ms", "failing"),
    [(20.0, 250.0, set()), (20.0, 500.0, {"first_token_ratio"}), (40.0, 250.0, {"p95_ratio", "p99_ratio"})],
)
def test_a_language_model_is_judged_by_its_first_token_and_by_each_further_one(
    token_ms: float, first_ms: float, failing: set[str]
) -> None:
    one = cohort(new=_writing(token_ms, first_ms, 1), old=_writing(20.0, 250.0, 2))
    found = {result.gate: result for result in judge(Gates(), [one], soaked=True)}
    assert {name for name, result in found.items() if result.verdict is Verdict.FAIL} == failing
    assert "first token" in found["first_token_ratio"].detail
    assert "first_token_ratio" not in verdicts(cohort(), soaked=True)

"""What a search tries, and in which order: the strategy is told scripted outcomes and never runs anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge.evaluation.latency_race import Latency, RelativeLatency
from kedge.evaluation.metric import Score
from kedge.evaluation.model import Model
from kedge.evaluation.worker_messages import EvaluateAnswer
from kedge.quantization.sensitivity import LayerSensitivity, Sensitivity
from kedge.search.budget import Budget
from kedge.search.candidate import Candidate
from kedge.search.effort import Effort
from kedge.search.latency import TargetLatency
from kedge.search.results import Attempt, Outcome
from kedge.search.strategy import Strategy
from kedge_protocol.errors import CapacityError, KedgeError, LoweringError, UnsupportedOperatorError
from kedge_targets import registry, target
from kedge_targets.numerics import Family, Precision
from kedge_targets.target import Target

LAYERS = [f"layer{number}" for number in range(10)]
SENSITIVITY = Sensitivity(
    metric="agreement",
    samples=16,
    layers=tuple(
        LayerSensitivity(
            name=name,
            operator="Conv",
            weights=100,
            sqnr_db={"int8": 10.0 + number, "w4a4": 5.0 + number},
            drop={"int8": 0.0, "w4a4": 0.0},
        )
        for number, name in enumerate(LAYERS)
    ),
)
Answer = Callable[[Candidate], tuple[float, int, float] | KedgeError]
"""A candidate → drop, bytes, milliseconds; or what stops it."""


def model(**changes: object) -> Model:
    given_: dict[str, object] = {
        "graph": "g",
        "digest": "d",
        "size_bytes": 1000,
        "inputs": (),
        "outputs": (),
        "activation_bytes": 1,
        "fixed_batch": False,
        "reference": "g",
    }
    return Model(**{**given_, **changes})  # type: ignore[arg-type]


def tried(
    answer: Answer,
    *,
    effort: Effort = Effort.NORMAL,
    budget: Budget | None = None,
    device: Target | None = None,
    sensitivity: Sensitivity | None = SENSITIVITY,
    agrees: Callable[[Candidate], float] | None = None,
    paces: Callable[[Candidate], float] | None = None,
    names: Callable[[Candidate], str] | None = None,
    call_ms: float = 2.0,
    **of_model: object,
) -> list[tuple[Candidate, Outcome]]:
    """Everything that a strategy asks for, with the outcomes that it is told."""
    device = device or target.find("generic-cpu")
    budget = budget or Budget(max_drop=0.01)
    choice = device.backends[0]
    compiler = registry.compiler(choice.name)
    strategy = Strategy(choice, compiler, device, model(**of_model), effort, lambda: sensitivity, budget=budget)
    batches = strategy.run()
    seen = []
    try:
        asked = next(batches)
        while True:
            outcomes = [told(one, answer, budget, agrees) for one in asked]
            for outcome in outcomes:
                if names is not None:
                    outcome.attempt.precision = names(outcome.candidate)
                if paces is not None:
                    ratio = paces(outcome.candidate)
                    pace = RelativeLatency(ratio=ratio, low=ratio * 0.97, high=ratio * 1.03)
                    outcome.attempt.latency_ms = Latency(p50=call_ms * ratio, p95=call_ms * ratio)
                    outcome.attempt.target_latency = TargetLatency(
                        p50=call_ms * ratio, source="measured here", estimated=device.name == "rpi4", pace=pace
                    )
            seen += list(zip(asked, outcomes, strict=True))
            assert len(seen) < 200
            asked = batches.send(outcomes)
    except StopIteration:
        return seen


def is_float32(candidate: Candidate) -> bool:
    return candidate.plan.default is Precision.FLOAT32


def told(candidate: Candidate, answer: Answer, budget: Budget, agrees: Callable[[Candidate], float] | None) -> Outcome:
    attempt = Attempt(backend="b", precision=candidate.plan.default.value, label=candidate.label)
    outcome = Outcome(candidate=candidate, attempt=attempt, plan=candidate.plan, folder=Path("f"))
    found = answer(candidate)
    if isinstance(found, KedgeError):
        outcome.error = found
        return outcome
    attempt.drop, attempt.size_bytes, latency = found
    outcome.evaluation = EvaluateAnswer(score=Score(value=1 - found[0]), memory_bytes=1, seconds=0.1, runtime="r")
    attempt.agreement = agrees(candidate) if agrees else None
    outcome.over = budget.excess(drop=found[0], size=found[1], latency=latency, agreement=attempt.agreement)
    return outcome


def labels(seen: list[tuple[Candidate, Outcome]]) -> list[str]:
    return [candidate.label for candidate, _ in seen]


def test_where_the_usual_precision_holds_nothing_else_is_tried() -> None:
    for effort in (Effort.QUICK, Effort.NORMAL):
        assert labels(tried(lambda c: (0.0, 300, 1.0), effort=effort)) == ["int8"]


ENDS = (("layer0", "layer9"), ("layer0", "layer1", "layer9"), ("layer0", "layer1", "layer2", "layer9"))


def test_both_ends_of_the_graph_are_tried_in_float_before_single_layers() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return (0.0 if len(candidate.plan.layers) >= 3 else 0.5), 300, 1.0

    seen = tried(answer, ends=ENDS)
    floats = [tuple(candidate.plan.layers) for candidate, _ in seen if candidate.plan.layers]
    assert floats == [ENDS[0], ENDS[2], ENDS[1]]
    assert seen[-1][1].holds


def test_ends_that_hold_barely_are_followed_by_larger_ones() -> None:
    drops = {0: 0.5, 2: 0.009, 3: 0.004, 4: 0.0}
    seen = tried(lambda c: (drops[len(c.plan.layers)], 300, 1.0), ends=ENDS)
    assert [tuple(candidate.plan.layers) for candidate, _ in seen] == [(), ENDS[0], ENDS[2], ENDS[1]]


def test_ends_that_all_hold_barely_are_tried_without_rounding_together_where_they_drop_least() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return 0.009 - 0.0001 * len(candidate.plan.layers) if candidate.plan.layers else 0.5, 300, 1.0

    seen = tried(answer, ends=ENDS)
    assert [(tuple(one.plan.layers), len(one.steps)) for one, _ in seen] == [
        ((), 0), (ENDS[0], 1), (ENDS[2], 1), (ENDS[2], 0),
    ]  # fmt: skip


def test_of_many_parts_few_are_tried() -> None:
    many = tuple(tuple(f"layer{number}" for number in range(count)) for count in range(1, 9))
    for least in range(1, 9):
        drops = [0.5] * least + [0.0] * (9 - least)
        seen = tried(functools.partial(_by_part, drops), ends=many)
        assert min(len(one.plan.layers) for one, outcome in seen if outcome.holds) == least
        assert len(seen) <= 5


def _by_part(drops: list[float], candidate: Candidate) -> tuple[float, int, float]:
    return drops[len(candidate.plan.layers)], 300, 1.0


def test_what_is_far_off_tries_the_ends_first() -> None:
    seen = tried(lambda c: (0.0 if c.plan.layers else 0.5, 300, 1.0), ends=ENDS)
    assert [tuple(candidate.plan.layers) for candidate, _ in seen] == [(), ENDS[0]]
    assert [step.use for step in seen[-1][0].steps] == ["compensate-rounding"]


def test_what_is_nearly_good_tries_other_ranges_first() -> None:
    seen = tried(lambda c: (0.0 if c.plan.layers else 0.03, 300, 1.0), ends=ENDS)
    assert len(seen) > 4
    assert not seen[1][0].plan.layers


def test_a_file_that_is_float_but_in_name_does_not_end_the_search() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        dynamic = candidate.plan.default is Precision.INT8_DYNAMIC
        return (0.0, 900, 1.2) if dynamic else (0.0 if len(candidate.plan.layers) >= 2 else 0.04, 300, 0.7)

    def name(candidate: Candidate) -> str:
        return "mixed" if candidate.plan.default is Precision.INT8_DYNAMIC else candidate.plan.default.value

    seen = tried(answer, names=name)
    holding = [candidate for candidate, outcome in seen if outcome.holds and candidate.plan.layers]
    assert [len(candidate.plan.layers) for candidate in holding] == [2]
    truly = tried(answer)
    assert truly[-1][0].plan.default is Precision.INT8_DYNAMIC


def test_where_the_ends_do_not_suffice_single_layers_follow() -> None:
    seen = tried(lambda c: (0.0 if "layer4" in c.plan.layers else 0.5, 300, 1.0), ends=ENDS)
    assert {ENDS[0], ENDS[2]} <= {tuple(candidate.plan.layers) for candidate, _ in seen}
    assert any(outcome.holds for _, outcome in seen)


@pytest.mark.parametrize("effort", [Effort.QUICK, Effort.NORMAL])
def test_what_is_slower_than_float_is_not_the_last_word(effort: Effort) -> None:
    seen = tried(lambda c: (0.0, 300, 1.0), effort=effort, paces=lambda c: 1.5 if c.plan.quantizes else 1.0)
    assert labels(seen) == ["int8", "float32", "float16", "codebook8"]


@pytest.mark.parametrize(("pace", "floats"), [(1.4, ["float32"]), (0.9, [])])
def test_half_the_bytes_alone_do_not_make_up_for_a_slower_call_however_short(pace: float, floats: list[str]) -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return (0.5 if candidate.plan.quantizes else 0.0), 300, 0.01

    seen = tried(answer, effort=Effort.QUICK, paces=lambda c: pace if not is_float32(c) else 1.0, call_ms=0.01)
    assert labels(seen) == ["int8", "float16", *floats]


@pytest.mark.parametrize(("pace", "floats"), [(0.5, []), (0.98, ["float32"]), (1.02, ["float32"])])
def test_float_is_tried_beside_what_is_not_surely_faster(pace: float, floats: list[str]) -> None:
    seen = tried(lambda c: (0.0, 300, 1.0), paces=lambda c: pace if c.plan.quantizes else 1.0)
    assert labels(seen) == ["int8", *floats]


def test_who_wants_bytes_gets_them_however_slow() -> None:
    budget = Budget(max_drop=0.01, max_size=1000)
    assert labels(tried(lambda c: (0.0, 300, 1.0), budget=budget, paces=lambda c: 1.5)) == ["int8"]


def test_a_hosts_figure_says_nothing_of_another_processor() -> None:
    rpi4 = target.find("rpi4")
    assert labels(tried(lambda c: (0.0, 300, 1.0), device=rpi4, paces=lambda c: 1.5)) == ["int8"]


@pytest.mark.parametrize(("pace", "floats"), [(0.4, []), (0.9, ["float32"]), (1.4, ["float32"])])
def test_another_runtimes_float_is_tried_where_int8_is_not_far_ahead(pace: float, floats: list[str]) -> None:
    # Beside the float model by ONNX Runtime it says little: this runtime's float may be the faster one.
    device = target.find("intel-cpu")
    seen = tried(lambda c: (0.0, 300, 1.0), device=device, paces=lambda c: pace)
    assert labels(seen) == ["int8", *floats]


def test_float_of_the_same_runtime_that_is_faster_brings_half_the_bytes_too() -> None:
    device = target.find("intel-cpu")
    seen = tried(lambda c: (0.0, 300, 1.0), device=device, paces=lambda c: 0.9 if c.plan.quantizes else 0.5)
    assert labels(seen) == ["int8", "float32", "float16"]


def test_a_name_that_is_not_true_does_not_end_the_search() -> None:
    def names(candidate: Candidate) -> str:
        return "mixed" if candidate.plan.quantizes else candidate.plan.default.value

    assert labels(tried(lambda c: (0.0, 300, 1.0), names=names)) == ["int8", "float16", "float32"]


def test_where_the_budget_is_barely_kept_cheap_steps_are_tried_and_no_more() -> None:
    seen = tried(lambda c: (0.009, 300, 1.0))
    cheap = ["compensate-rounding + int8", "equalize + int8", "equalize + correct-bias + int8", "int8 (mse)"]
    assert labels(seen) == ["int8", *cheap]
    assert labels(tried(lambda c: (0.004, 300, 1.0))) == ["int8"]
    answers = Budget(max_drop=0.01, min_agreement=0.9)
    assert len(tried(lambda c: (0.0, 300, 1.0), budget=answers, agrees=lambda c: 0.92)) == 5
    assert len(tried(lambda c: (0.0, 300, 1.0), budget=answers, agrees=lambda c: 0.97)) == 1
    assert labels(tried(lambda c: (0.009, 300, 1.0), effort=Effort.QUICK)) == ["int8"]


def test_answers_that_changed_are_repaired_like_a_drop() -> None:
    # The best metric is not the one that agrees: what keeps the whole promise wins.
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return (-0.1 if not candidate.steps else 0.0), 300, 1.0

    def agrees(candidate: Candidate) -> float:
        return 0.97 if [step.use for step in candidate.steps] == ["equalize", "correct-bias"] else 0.9

    seen = tried(answer, budget=Budget(max_drop=0.01, min_agreement=0.95), agrees=agrees)
    assert [outcome.holds for _, outcome in seen].count(True) == 1
    assert not any(candidate.plan.layers for candidate, _ in seen)
    assert not any(step.use == "fine-tune" for candidate, _ in seen for step in candidate.steps)


def test_quick_goes_up_to_float_and_no_further() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return (0.0 if candidate.plan.default is Precision.FLOAT32 else 0.5, 300, 1.0)

    assert labels(tried(answer, effort=Effort.QUICK)) == ["int8", "float16", "float32"]


def test_what_is_cheap_is_tried_before_layers_go_to_float_and_these_and_float_before_training() -> None:
    seen = tried(lambda c: (0.5, 300, 1.0))
    kinds = [
        "train" if any(s.use == "fine-tune" for s in c.steps) else "mixed" if c.plan.layers else c.plan.default.value
        for c, _ in seen
    ]
    assert kinds[0] == "int8"
    cheap = [i for i, (c, _) in enumerate(seen) if not c.plan.layers and any(s.use == "equalize" for s in c.steps)]
    assert kinds.index("mixed") > min(cheap)
    assert kinds.index("float16") > kinds.index("mixed")
    assert kinds[-3:] == ["float16", "float32", "train"]


@pytest.mark.parametrize("needed", range(1, 9))
def test_the_fewest_layers_in_float_are_found(needed: int) -> None:
    """The worst ``needed`` layers must be in float, whatever else is done."""

    def answer(candidate: Candidate) -> tuple[float, int, float]:
        if candidate.plan.default is not Precision.INT8:
            return 0.5, 300, 1.0
        return (0.0 if set(LAYERS[:needed]) <= set(candidate.plan.layers) else 0.5), 300, 1.0

    seen = tried(answer)
    holding = [candidate for candidate, outcome in seen if outcome.holds]
    assert min(len(candidate.plan.layers) for candidate in holding) == needed
    best = min(holding, key=lambda one: len(one.plan.layers))
    assert set(best.plan.layers) == set(LAYERS[:needed])
    assert all("dB" in best.reasons[name] for name in best.plan.layers)
    assert not any(step.use == "fine-tune" for candidate, _ in seen for step in candidate.steps)


@pytest.mark.parametrize("device", ["generic-cpu", "intel-cpu"])
def test_attention_goes_to_float_first_where_it_is_integers(device: str) -> None:
    products = ("qk", "av")
    found = target.find(device)
    usual = registry.compiler(found.backends[0].name).quantized_for(found)[0]

    def answer(candidate: Candidate) -> tuple[float, int, float]:
        held = candidate.plan.default is Precision.INT8 and set(products) <= set(candidate.plan.layers)
        return (0.0 if held else 0.5), 300, 1.0

    seen = tried(answer, device=found, attention=products)
    mixed = [candidate for candidate, _ in seen if candidate.plan.layers]
    if not usual.products:
        assert mixed
        assert not any(set(candidate.plan.layers) & set(products) for candidate in mixed)
        return
    assert set(mixed[0].plan.layers) == set(products)
    assert set(mixed[0].reasons.values()) == {"attention"}
    assert len(mixed) == 1


def test_a_size_that_int8_does_not_keep_leads_to_fewer_bits_and_then_to_less_network() -> None:
    seen = tried(lambda c: (0.0, 300, 1.0), budget=Budget(max_drop=0.01, max_size=200))
    families = [candidate.plan.default.family for candidate, _ in seen]
    assert Family.WEIGHTS in families
    ratios = [s.options["ratio"] for c, _ in seen for s in c.steps if s.use == "prune-channels"]
    assert ratios == sorted(ratios)
    assert len(ratios) > 1
    assert all(candidate.steps[-1].use == "distil" for candidate, _ in seen if candidate.steps)


def test_of_small_weights_that_drop_the_best_is_fine_tuned_and_what_keeps_the_budget_ends_it() -> None:
    drops = {Precision.INT4: 0.3, Precision.CODEBOOK4: 0.2, Precision.LOG4: 0.4}

    def answer(candidate: Candidate) -> tuple[float, int, float]:
        precision = candidate.plan.default
        small = precision.family is Family.WEIGHTS and precision.weight_bits == 4
        tuned = any(step.use == "fine-tune" for step in candidate.steps)
        return (0.0 if tuned else drops.get(precision, 0.0)), 150 if small else 300, 1.0

    seen = tried(answer, budget=Budget(max_drop=0.01, max_size=200))
    assert [c.plan.default for c, _ in seen if c.steps] == [Precision.CODEBOOK4]
    assert seen[-1][1].holds
    every = tried(answer, budget=Budget(max_drop=0.01, max_size=200), effort=Effort.HIGH)
    tuned = {c.plan.default for c, _ in every if any(step.use == "fine-tune" for step in c.steps)}
    assert tuned >= set(drops)


def test_fabric_that_has_no_room_leads_to_fewer_bits() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float] | KedgeError:
        if candidate.plan.default.weight_bits > 2:
            return CapacityError("too large")
        return (0.0 if candidate.steps else 0.5), 300, 1.0

    seen = tried(answer, device=target.find("pynq-z2"))
    assert labels(seen) == [f"{one} (mse)" for one in ("w4a4", "w3a3", "w2a2", "fine-tune + w2a2")]
    assert seen[-1][1].holds
    assert labels(tried(answer, device=target.find("pynq-z2"), effort=Effort.QUICK)) == ["w4a4 (mse)"]


def test_pruning_stops_when_accuracy_is_gone() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return (0.5 if candidate.steps else 0.0), 300, 5.0

    seen = tried(answer, budget=Budget(max_drop=0.01, max_latency=1.0))
    assert sum(any(s.use == "prune-channels" for s in c.steps) for c, _ in seen) == 1


def test_heads_of_a_transformer_and_channels_of_the_rest_are_pruned() -> None:
    budget = Budget(max_drop=0.01, max_latency=1.0)
    seen = tried(lambda c: (0.0, 300, 5.0), budget=budget, attention=("qk", "av"))
    used = {step.use for candidate, _ in seen for step in candidate.steps}
    assert {"prune-heads", "prune-width"} <= used
    assert "prune-channels" not in used


def test_an_operator_that_the_backend_does_not_know_ends_it() -> None:
    assert labels(tried(lambda c: UnsupportedOperatorError("no Det"))) == ["int8"]


def test_high_effort_tries_everything_though_nothing_is_needed() -> None:
    seen = tried(lambda c: (0.0, 300, 1.0), effort=Effort.HIGH)
    used = {step.use for candidate, _ in seen for step in candidate.steps}
    assert {"equalize", "correct-bias", "fine-tune", "prune-channels", "distil"} <= used
    assert {c.plan.default for c, _ in seen} >= {Precision.INT8, Precision.INT4, Precision.FLOAT16}


@settings(max_examples=60)
@given(
    drops=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    effort=st.sampled_from(list(Effort)),
    size=st.none() | st.integers(1, 1000),
    fails=st.sets(st.integers(0, 40)),
)
def test_whatever_comes_back_it_ends_and_repeats_itself(
    drops: list[float], effort: Effort, size: int | None, fails: set[int]
) -> None:
    def run() -> list[str]:
        count = 0

        def answer(candidate: Candidate) -> tuple[float, int, float] | KedgeError:
            nonlocal count
            count += 1
            if count in fails:
                return LoweringError("no")
            return drops[count % len(drops)], 300, 1.0

        return labels(tried(answer, effort=effort, budget=Budget(max_drop=0.1, max_size=size)))

    assert run() == run()


def test_layers_in_float_that_take_too_many_bytes_get_activations_of_16_bits() -> None:
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        layers = candidate.plan.layers
        if candidate.plan.default is Precision.INT8 and len(layers) >= 2:
            return 0.0, (300 if Precision.INT16 in layers.values() else 500), 1.0
        return 0.2, 250, 1.0

    budget = Budget(max_drop=0.01, max_size=400)
    seen = tried(answer, device=target.find("rpi4"), budget=budget)
    wide = [one for one, _ in seen if Precision.INT16 in one.plan.layers.values()]
    assert [set(one.plan.layers.values()) for one in wide] == [{Precision.INT16}]
    assert any(outcome.holds for one, outcome in seen if one is wide[0])
    enough = tried(answer, device=target.find("rpi4"), budget=Budget(max_drop=0.01))
    assert not [one for one, _ in enough if Precision.INT16 in one.plan.layers.values()]


def test_float_is_tried_where_what_holds_is_larger_than_the_model() -> None:
    # As the unrolled steps of a small LSTM are, with a constant for each.
    def answer(candidate: Candidate) -> tuple[float, int, float]:
        return 0.0, 20000 if candidate.plan.default is Precision.INT8 else 1000, 1.0

    seen = tried(answer, device=target.find("rpi4"), paces=lambda one: 0.5)
    assert labels(seen) == ["int8", "float32"]
    assert "larger than the float model" in seen[-1][0].why
    small = Budget(max_drop=0.01, max_size=30000)
    assert labels(tried(answer, device=target.find("rpi4"), paces=lambda one: 0.5, budget=small)) == ["int8"]


@pytest.mark.parametrize(("drop", "pace", "wanted"), [(0.5, 0.5, ["float32"]), (0.0, 0.5, []), (0.0, 1.5, ["float32"])])
def test_float_is_tried_when_the_time_is_up_where_it_may_be_what_is_left(
    drop: float, pace: float, wanted: list[str]
) -> None:
    device, budget = target.find("generic-cpu"), Budget(max_drop=0.01)
    choice = device.backends[0]
    strategy = Strategy(
        choice, registry.compiler(choice.name), device, model(), Effort.NORMAL, lambda: SENSITIVITY, budget=budget
    )
    (first,) = next(strategy.run())
    outcome = told(first, lambda one: (drop, 300, 1.0), budget, None)
    outcome.attempt.latency_ms = Latency(p50=2.0, p95=2.0)
    relative = RelativeLatency(ratio=pace, low=pace * 0.97, high=pace * 1.03)
    outcome.attempt.target_latency = TargetLatency(p50=2.0, source="measured here", estimated=False, pace=relative)
    last = strategy.when_time_is_up([outcome])
    assert [one.label for one in last] == wanted
    assert (
        strategy.when_time_is_up([outcome, *(told(one, lambda _: (0.0, 1000, 1.0), budget, None) for one in last)])
        == []
    )

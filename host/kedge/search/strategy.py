"""Decides what a search tries on one backend, and in which order: cheap candidates before expensive ones, and only what
the budget still calls for.

A strategy is a generator: it yields batches of candidates and receives their outcomes. It runs nothing itself, so it
does not depend on where trials run and is tested in isolation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

from kedge.evaluation.model import Model
from kedge.quantization.sensitivity import Sensitivity
from kedge.search import bisection, float_beside, ranking
from kedge.search.budget import ACCURACY, Budget
from kedge.search.candidate import Candidate, StepChoice
from kedge.search.effort import Effort
from kedge.search.results import Outcome
from kedge_protocol.errors import CapacityError, UnsupportedOperatorError
from kedge_targets.contract import Compiler
from kedge_targets.numerics import Family, Plan, Precision, RangeMethod
from kedge_targets.target import BackendChoice, Target

Batches = Generator[list[Candidate], list[Outcome], None]
AtTheEnd = Callable[[Sequence[Outcome]], list[Candidate]]
"""What a backend's candidates gave → the candidates that are still tried when the time is up."""

_SMALL_WEIGHTS = (Precision.INT4, Precision.CODEBOOK4, Precision.LOG4, Precision.CODEBOOK8, Precision.LOG8)
_RATIOS = (0.25, 0.5, 0.7)
"""Shares of channels to prune, tried in this order."""
_HEAD_RATIOS = (0.25, 0.5)
_USUAL = "the usual precision of this backend"
_FAR = 5.0
"""Excess over the budget, in hundredths, that is considered large."""
_BESIDE = "what is smaller may be slower than float"
_LARGER = "what keeps the budget is larger than the float model"
_TIME_IS_UP = "the time is up, and float may be what is left"
_UNSEEN = "what keeps the budget does not keep it on other samples"
_UNTRUE = "the usual precision is not what the file's numbers are"
_REPAIR = StepChoice(use="distil")
_FINE_TUNE = StepChoice(use="fine-tune")
_COMPENSATE = StepChoice(use="compensate-rounding")


class Strategy:
    """Generates the candidates of one backend.

    Args:
        sensitivity: measures layer sensitivity when first needed; returns None if it cannot be measured.
        budget: the budget to keep; outcomes say whether they keep it.
    """

    def __init__(
        self,
        choice: BackendChoice,
        compiler: Compiler,
        target: Target,
        model: Model,
        effort: Effort,
        sensitivity: Callable[[], Sensitivity | None],
        *,
        budget: Budget | None = None,
    ) -> None:
        self._choice = choice
        self._numerics = compiler.numerics
        self._schemes = compiler.quantized_for(target)
        self._model = model
        self._effort = effort
        self._sensitivity = sensitivity
        self._budget = budget or Budget(max_drop=0.0)
        self._reference = compiler.reference
        available = Precision.FLOAT32 in self._numerics.precisions
        self._float = float_beside.FloatBeside(available, self._reference, self._budget, model.float_bytes)

    def run(self) -> Batches:
        """Yield all candidates; float last, if nothing before is faster than float."""
        seen: list[Outcome] = []
        batches = self._tried()
        asked = next(batches)
        while True:
            outcomes = yield asked
            seen += outcomes
            try:
                asked = batches.send(outcomes)
            except StopIteration:
                break
        yield from self._beside(seen)

    def _tried(self) -> Batches:
        if self._model.quantized and self._numerics.quantized_graphs:
            yield [self._candidate(self._plan(Precision.W8A8), why="the model is quantized already: taken as it is")]
            return
        usual = self._usual()
        (first,) = yield [self._candidate(self._plan(usual), why=_USUAL)]
        if isinstance(first.error, UnsupportedOperatorError):
            return
        if first.holds and not first.named_truly:
            # A name that is not true wins nothing: what is truly so is tried beside it.
            yield [self._candidate(self._plan(one), why=_UNTRUE) for one in self._floats()]
        elif usual.family is Family.FABRIC:
            yield from self._fabric(first)
        elif self._effort is Effort.QUICK:
            if not first.holds:
                yield from self._larger(usual)
        else:
            yield from self._deeper(first, usual)

    def _floats(self) -> list[Precision]:
        return [one for one in (Precision.FLOAT16, Precision.FLOAT32) if one in self._numerics.precisions]

    def _beside(self, seen: Sequence[Outcome]) -> Batches:
        """Try float if the candidates that hold may be slower on the target or are no smaller, and the user did not ask
        for size; if they certainly are slower, also small precisions that compute in float."""
        if not self._float.may_win(seen):
            return
        quickest = float_beside.quickest(seen)
        slow = quickest is not None and self._float.maybe_slower(quickest)
        (floating,) = yield [self._candidate(self._plan(Precision.FLOAT32), why=_BESIDE if slow else _LARGER)]
        if quickest is not None and quickest.pace is not None and floating.pace is not None:
            pace = quickest.pace if self._reference else quickest.pace.beside(floating.pace)
            if quickest.in_integers and quickest.loses(pace):
                small = [one for one in (Precision.FLOAT16, Precision.CODEBOOK8) if one in self._numerics.precisions]
                yield [self._candidate(self._plan(one), why="small, and computed in float") for one in small]

    def when_time_is_up(self, seen: Sequence[Outcome]) -> list[Candidate]:
        """Return the candidate that is still tried then: float, if none of these keeps the budget, or what does may be
        no better than float. It takes one lowering, and without it a search may end with nothing or with less."""
        if not seen or Precision.FLOAT32 not in self._numerics.precisions or float_beside.has_float(seen):
            return []
        if any(one.holds for one in seen) and not self._float.may_win(seen):
            return []
        return [self._candidate(self._plan(Precision.FLOAT32), why=_TIME_IS_UP)]

    def in_float(self, seen: Sequence[Outcome]) -> list[Candidate]:
        """Return the whole graph in float16 and float32, as far as these were not tried."""
        tried = {one.candidate.key for one in seen}
        made = [self._candidate(self._plan(one), why=_UNSEEN) for one in self._floats()]
        return [one for one in made if one.key not in tried and not self._model.quantized]

    def _usual(self) -> Precision:
        """Return the usual precision: 4 bits on FPGAs, else static int8, else the smallest float."""
        has = self._numerics.precisions
        for precision in (Precision.W4A4, Precision.INT8, Precision.FLOAT16):
            if precision in has and (precision is not Precision.INT8 or self._schemes):
                return precision
        return Precision.FLOAT32

    def _larger(self, than: Precision) -> Batches:
        """Try the whole graph in float16, then float32, until one keeps the accuracy."""
        for precision in (Precision.FLOAT16, Precision.FLOAT32):
            if precision is not than and precision in self._numerics.precisions:
                (outcome,) = yield [self._candidate(self._plan(precision), why="the smaller one does not hold")]
                if outcome.holds_accuracy:
                    return

    # On processors: static int8, repaired where it must be.

    def _deeper(self, first: Outcome, usual: Precision) -> Batches:
        high = self._effort is Effort.HIGH
        if first.holds and not high:
            if self._barely(first) and usual.family is Family.STATIC:
                yield self._cheap()
            return
        base, kept, untrained = first, first.holds_accuracy, None
        if usual.family is Family.STATIC and (high or not kept):
            base, untrained = yield from self._repaired(first)
            kept = base.suffices
        if not kept or high:
            yield from self._larger(usual)
            if untrained is not None:
                # This takes longest, so all that may be left when the time is up is tried before.
                (tuned,) = yield [self._fine_tuned(untrained.candidate)]
                if not kept:
                    base, kept = ranking.least_drop([tuned] if tuned.suffices else [base, tuned]), tuned.suffices
        if kept and "size" in base.over and base.candidate.plan.layers:
            yield from self._narrower(base)
        over = set(base.over)
        if high or (kept and over & {"size", "latency"}):
            yield from self._smaller(base, size=high or "size" in over, latency=high or "latency" in over)

    def _barely(self, one: Outcome) -> bool:
        """Return whether most of the budget is used up."""
        budget, attempt = self._budget, one.attempt
        if budget.max_drop > 0 and attempt.drop is not None and attempt.drop > budget.max_drop / 2:
            return True
        if budget.min_agreement is None or attempt.agreement is None:
            return False
        return 1 - attempt.agreement > (1 - budget.min_agreement) / 2

    def _repaired(self, first: Outcome) -> Generator[list[Candidate], list[Outcome], tuple[Outcome, Outcome]]:
        """Repair static int8 without training: other ranges, equalization, bias correction; then layers in float.
        Return the best outcome, and the one to train: the best without layers in float."""
        seen = [first]
        if self._numerics.mixed and max(first.over.get("drop", 0.0), first.over.get("output", 0.0)) > _FAR:
            # No change of ranges makes good so much: more likely an end of the graph is rounded that must not be.
            seen += yield from self._ended(first)
            enough = [one for one in seen if one.suffices]
            if enough and self._effort is not Effort.HIGH:
                return enough[0], first
        seen += yield self._variants()
        best = ranking.least_drop(
            [one for one in seen if one.suffices] or [one for one in seen if one.named_truly] or seen
        )
        if best.suffices and self._effort is not Effort.HIGH:
            return best, best
        if self._numerics.mixed:
            seen += yield from self._ended(best)
            if not any(one.suffices for one in seen) or self._effort is Effort.HIGH:
                seen += yield from self._mixed(best)
        return next((one for one in seen if one.suffices), ranking.least_drop(seen)), best

    def _fine_tuned(self, of: Candidate) -> Candidate:
        why = "quantization-aware fine-tuning from the float model's own answers"
        return self._candidate(of.plan, (*of.steps, _FINE_TUNE), why=why)

    def _cheap(self) -> list[Candidate]:
        """Return the candidates most likely to do better at the same cost on the device."""
        plan, why = self._plan(Precision.INT8), "the first keeps the budget barely"
        equalize = StepChoice(use="equalize")
        made = [
            self._candidate(plan, (_COMPENSATE,), why=why),
            self._candidate(plan, (equalize,), why=why),
            self._candidate(plan, (equalize, StepChoice(use="correct-bias")), why=why),
        ]
        if RangeMethod.MSE in self._numerics.range_methods:
            made.append(self._candidate(dataclasses.replace(plan, range_method=RangeMethod.MSE), why=why))
        return made

    def _variants(self) -> list[Candidate]:
        """Return cheap variants: no training, every layer in int8."""
        plan = self._plan(Precision.INT8)
        made = [
            self._candidate(dataclasses.replace(plan, range_method=method), why="ranges that leave outliers out")
            for method in (RangeMethod.MSE, RangeMethod.PERCENTILE, RangeMethod.ENTROPY)
            if method in self._numerics.range_methods
        ]
        equalize, correct = StepChoice(use="equalize"), StepChoice(use="correct-bias")
        split = StepChoice(use="split-outliers", options={"widening": False})
        made.append(self._candidate(plan, (_COMPENSATE,), why="weights whose rounding errors compensate each other"))
        made.append(self._candidate(plan, (equalize,), why="outliers evened out between layers"))
        made.append(self._candidate(plan, (equalize, correct), why="evened out, and mean errors corrected"))
        if self._numerics.mixed:
            made.append(self._candidate(plan, (split, equalize), why="outliers in float beside, the rest evened out"))
        if Precision.INT8_DYNAMIC in self._numerics.precisions:
            dynamic = self._plan(Precision.INT8_DYNAMIC)
            made.append(self._candidate(dynamic, why="activations in ranges of each call"))
        return made

    def _ended(self, best: Outcome) -> Generator[list[Candidate], list[Outcome], list[Outcome]]:
        """Find the smallest part of both ends of the graph that keeps the accuracy well in float, the others with
        weights rounded together. If none does, also try the part that drops least as it is, and with the settings of
        the best so far."""
        ends = self._model.ends
        if not ends:
            return []
        plain = self._plan(Precision.INT8)

        def at(part: int, plan: Plan = plain, steps: tuple[StepChoice, ...] = (_COMPENSATE,)) -> Candidate:
            reasons = dict.fromkeys(ends[part], "at an end of the graph: few weights, wide ranges")
            return self._floating(plan, steps, ends[part], reasons, why="both ends of the graph stay in float")

        found, enough = yield from bisection.smallest(len(ends), at, lambda one: one.suffices and not self._barely(one))
        seen = list(found.values())
        if enough is not None:
            return seen
        least = ranking.least_drop(seen)
        part = next(place for place, outcome in found.items() if outcome is least)
        again, other = [at(part, steps=())], best.candidate
        tried = ((plain, ()), (plain, (_COMPENSATE,)))
        if other.plan.default is Precision.INT8 and not other.plan.layers and (other.plan, other.steps) not in tried:
            again.append(at(part, other.plan, other.steps))
        return [*seen, *(yield again)]

    def _mixed(self, base: Outcome) -> Generator[list[Candidate], list[Outcome], list[Outcome]]:
        """Find the fewest layers in float that keep the accuracy: attention first if there is any, then by sensitivity,
        doubling and halving their number."""
        seen: list[Outcome] = []
        plan, steps = base.candidate.plan, base.candidate.steps
        if plan.default is not Precision.INT8:
            plan, steps = self._plan(Precision.INT8), ()
        if self._model.attention and (plan.scheme is None or plan.scheme.products):
            seen += yield [
                self._floating(plan, steps, self._model.attention, dict.fromkeys(self._model.attention, "attention"))
            ]
            if seen[-1].holds_accuracy:
                return seen
        order = ranking.by_sensitivity(self._sensitivity(), Precision.INT8)
        names = list(order)
        enough, too_few, count = None, 0, 1
        while enough is None and count < len(names):
            counts = [count, min(2 * count, len(names) - 1)]
            outcomes = yield [self._floating(plan, steps, names[:k], order) for k in dict.fromkeys(counts)]
            seen += outcomes
            for k, outcome in zip(dict.fromkeys(counts), outcomes, strict=True):
                if outcome.holds_accuracy:
                    enough = k
                    break
                too_few = k
            count = 4 * count
        while enough is not None and enough - too_few > 1:
            middle = (enough + too_few) // 2
            outcomes = yield [self._floating(plan, steps, names[:middle], order)]
            seen += outcomes
            if outcomes[0].holds_accuracy:
                enough = middle
            else:
                too_few = middle
        return seen

    def _floating(
        self,
        plan: Plan,
        steps: tuple[StepChoice, ...],
        names: Sequence[str],
        reasons: Mapping[str, str],
        why: str = "the layers that suffer most stay in float",
    ) -> Candidate:
        layers = dict.fromkeys(names, Precision.FLOAT32)
        return self._candidate(
            dataclasses.replace(plan, layers=layers),
            steps,
            why=why,
            reasons={name: reasons[name] for name in names},
        )

    def _narrower(self, base: Outcome) -> Batches:
        """Try integer weights for the layers that a candidate keeps in float, with activations of more bits."""
        plan = base.candidate.plan
        for precision in self._numerics.layers:
            layers = dict.fromkeys(plan.layers, precision)
            yield [
                self._candidate(
                    dataclasses.replace(plan, layers=layers),
                    base.candidate.steps,
                    why="the layers in float take too many bytes",
                    reasons=base.candidate.reasons,
                )
            ]

    def _smaller(self, base: Outcome, *, size: bool, latency: bool) -> Batches:
        """Try what is smaller or faster than int8: low-bit weights, then fewer channels, heads and units, each repaired
        by training."""
        if size:
            small = [one for one in _SMALL_WEIGHTS if one in self._numerics.precisions]
            plain = yield [self._candidate(self._plan(one), why="weights of few bits") for one in small]
            tuned = yield from self._tuned(plain)
            if self._effort is not Effort.HIGH and any(one.holds for one in (*plain, *tuned)):
                return
        yield from self._pruned(base.candidate)

    def _tuned(self, plain: Sequence[Outcome]) -> Generator[list[Candidate], list[Outcome], list[Outcome]]:
        """Fine-tune the low-bit candidates that fail only in accuracy; without high effort only the best one."""
        high = self._effort is Effort.HIGH
        if not high and any(one.holds for one in plain):
            return []
        near = [
            one
            for one in plain
            if one.measured and one.candidate.plan.default.weight_bits < 8 and (set(one.over) <= ACCURACY or high)
        ]
        near = [one for one in near if not one.holds_accuracy]
        near.sort(key=lambda one: one.attempt.drop or 0.0)
        again = [
            self._candidate(one.candidate.plan, (_FINE_TUNE,), why="the same, fine-tuned")
            for one in (near if high else near[:1])
        ]
        return (yield again) if again else []

    def _pruned(self, base: Candidate) -> Batches:
        """Prune more and more of the network as long as it keeps the accuracy."""
        plan = dataclasses.replace(base.plan, layers={}, ranges={})
        for pruning in self._prunings():
            steps = (*pruning, _REPAIR)
            (outcome,) = yield [self._candidate(plan, steps, why="less of the network, repaired by self-distillation")]
            if not outcome.holds_accuracy or (outcome.holds and self._effort is not Effort.HIGH):
                return

    def _prunings(self) -> Iterator[tuple[StepChoice, ...]]:
        if self._model.attention:
            for ratio in _HEAD_RATIOS:
                yield (
                    StepChoice(use="prune-heads", options={"ratio": ratio}),
                    StepChoice(use="prune-width", options={"ratio": ratio}),
                )
        else:
            for ratio in _RATIOS:
                yield (StepChoice(use="prune-channels", options={"ratio": ratio}),)

    # On programmable logic: the fewest bits.

    def _fabric(self, first: Outcome) -> Batches:
        has = self._numerics.precisions
        too_large = isinstance(first.error, CapacityError)
        if not first.holds_accuracy and not too_large:
            if self._numerics.mixed and Precision.W8A8 in has and first.measured:
                order = ranking.by_sensitivity(self._sensitivity(), Precision.W4A4)
                names, count = list(order), 1
                while count < len(names) and self._effort is not Effort.QUICK:
                    plan = dataclasses.replace(
                        self._plan(Precision.W4A4), layers=dict.fromkeys(names[:count], Precision.W8A8)
                    )
                    (outcome,) = yield [
                        self._candidate(
                            plan,
                            why="the layers that suffer most get 8 bits",
                            reasons={n: order[n] for n in names[:count]},
                        )
                    ]
                    if outcome.holds_accuracy:
                        break
                    count *= 2
            if self._effort is not Effort.QUICK and first.measured:
                tuned = self._candidate(self._plan(Precision.W4A4), (_FINE_TUNE,), why="quantization-aware fine-tuning")
                (outcome,) = yield [tuned]
                if outcome.holds:
                    return
            if Precision.W8A8 in has:
                yield [self._candidate(self._plan(Precision.W8A8), why="4 bits do not hold")]
            return
        if self._effort is Effort.QUICK or (first.holds and self._effort is Effort.NORMAL):
            return
        for precision in (Precision.W3A3, Precision.W2A2):
            if precision in has:
                (plain,) = yield [self._candidate(self._plan(precision), why="fewer bits take less of the fabric")]
                if isinstance(plain.error, CapacityError):
                    continue
                if not plain.holds_accuracy:
                    (plain,) = yield [self._candidate(self._plan(precision), (_FINE_TUNE,), why="the same, fine-tuned")]
                if not plain.holds_accuracy or (plain.holds and self._effort is Effort.NORMAL):
                    return

    def _plan(self, precision: Precision) -> Plan:
        method = RangeMethod.MIN_MAX
        if precision.family is Family.FABRIC and RangeMethod.MSE in self._numerics.range_methods:
            method = RangeMethod.MSE
        integer = precision.family in (Family.STATIC, Family.DYNAMIC)
        scheme = self._schemes[0] if integer and self._schemes else None
        return Plan(default=precision, scheme=scheme, range_method=method)

    def _candidate(
        self,
        plan: Plan,
        steps: tuple[StepChoice, ...] = (),
        *,
        why: str,
        reasons: Mapping[str, str] | None = None,
    ) -> Candidate:
        return Candidate(backend=self._choice, plan=plan, steps=steps, why=why, reasons=dict(reasons or {}))

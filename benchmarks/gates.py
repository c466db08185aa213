"""Gates of rollouts, on cohorts drawn at random: how often a sequential test errs, how many calls it takes to decide
beside a test of a fixed number of calls, and how often a good release on noisy devices is aborted over all gates.

``KEDGE_GATE_ROLLOUTS`` sets how many rollouts are drawn (1000), ``KEDGE_GATE_SEED`` of which seed (101).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.support.drawn_cohorts import Drawing, Outcome, by_gate, by_test, fixed_calls, interval
from tests.support.drawn_rollouts import GOOD, RELEASES, play

from benchmarks.harness import Result

ROLLOUTS = int(os.environ.get("KEDGE_GATE_ROLLOUTS", "1000"))
SEED = int(os.environ.get("KEDGE_GATE_SEED", "101"))
FLEETS = {
    "5 devices, 6 calls a minute each": Drawing(bursts=20.0),
    "5 devices, 12 calls, errors in bursts": Drawing(calls=12, bursts=10.0),
    "20 devices, 2 calls": Drawing(devices=20, calls=2, bursts=20.0),
}


def run() -> Iterator[Result]:
    """Both proofs, as tables and as goals."""
    print(
        "| test | devices | aborts a good release (α) | passes a bad one (β) | calls, good | calls, bad "
        "| calls of the fixed test | ratio | textbook's | ratio |\n|" + "---|" * 10
    )
    for name, drawing in FLEETS.items():
        for kind, test in (("SPRT", by_test), ("gate", by_gate)):
            found = test(SEED, ROLLOUTS, drawing)
            print(_row(kind, name, found, fixed_calls(drawing)), flush=True)
            yield from _goals(kind, name, found)
    print("\n| rollouts of seven targets, a look a minute | aborted | minutes to the abort, median |\n|---|---|---|")
    for name, release in RELEASES.items():
        ends = play(SEED, ROLLOUTS // 2 if release is GOOD else ROLLOUTS // 5, release)
        print(
            f"| {name} | {len(ends.minutes)} of {ends.rollouts} | {f'{ends.median:.0f}' if ends.minutes else '–'} |",
            flush=True,
        )
        met = ends.aborted <= 0.05 if release is GOOD else ends.aborted >= 0.95
        goal = "≤0.05" if release is GOOD else "≥0.95"
        yield Result(f"gates: {name}", "first wave", "aborted", ends.aborted, None, "", goal, met)


def _row(kind: str, name: str, found: Outcome, textbook: float) -> str:
    alpha, beta = interval(found.false_aborts, found.rollouts), interval(found.misses, found.rollouts)
    return (
        f"| {kind} | {name} | {found.false_aborts / found.rollouts:.3f} ({alpha[0]:.3f} to {alpha[1]:.3f}) "
        f"| {found.misses / found.rollouts:.3f} ({beta[0]:.3f} to {beta[1]:.3f}) | {found.calls_good:.0f} "
        f"| {found.calls_bad:.0f} | {found.fixed:.0f} | {found.ratio:.2f} | {textbook:.0f} "
        f"| {(found.calls_good + found.calls_bad) / 2 / textbook:.2f} |"
    )


def _goals(kind: str, name: str, found: Outcome) -> Iterator[Result]:
    """The test meets its error probabilities; the gate, which reckons with the worst, keeps them at most."""
    for letter, count in (("α", found.false_aborts), ("β", found.misses)):
        low, high = interval(count, found.rollouts)
        goal = "interval holds 0.05" if kind == "SPRT" else "interval not above 0.05"
        met = low <= 0.05 and (kind == "gate" or high >= 0.05)
        yield Result(f"gates: {letter} of the {kind}", name, "", count / found.rollouts, None, "", goal, met)
    calls = (found.calls_good + found.calls_bad) / 2
    yield Result(
        f"gates: sample of the {kind}", name, "calls", calls, found.fixed, "fixed test", "≤0.6×", found.ratio <= 0.6
    )

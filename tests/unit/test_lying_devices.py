"""Whatever one device of five says, it fails no good release and makes no bad one pass."""

from __future__ import annotations

import math

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.test_staged_gates import cohort, figures, shares, spreads, verdicts

from kedge.fleet.staged.cohorts import CallFigures, Share, Spread
from kedge.fleet.staged.gates import Verdict

MEASURED = ("error_rate", "p95_ratio", "p99_ratio")
Said = tuple[list[tuple[int, int]], list[float]]
"""Calls and how many of them failed, by blocks of time; and latencies in milliseconds."""

blocks = st.tuples(st.integers(0, 10_000), st.floats(0, 1)).map(lambda one: (one[0], round(one[0] * one[1])))
said: st.SearchStrategy[Said] = st.tuples(
    st.lists(blocks, min_size=1, max_size=12), st.lists(st.floats(1e-9, 1e9), max_size=12)
)


def _with_liar(honest: CallFigures, said: Said) -> CallFigures:
    share, spread = Share(), Spread()
    for total, bad in said[0]:
        share = share.with_block(total, bad)
    for milliseconds in said[1]:
        spread = spread.with_value(math.log(milliseconds))
    liar = figures([share], [spread]).devices[0]
    return CallFigures(devices=(*honest.devices[1:], liar))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(before=said, after=said)
def test_one_liar_of_five_fails_no_good_release(before: Said, after: Said) -> None:
    good = cohort(
        new=_with_liar(figures(shares(1, [0.01] * 5), spreads(1, [10.0] * 5)), after),
        old=_with_liar(figures(shares(2, [0.01] * 5), spreads(2, [10.0] * 5)), before),
    )
    found = verdicts(good)
    assert Verdict.FAIL not in {found[gate].verdict for gate in MEASURED}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(before=said, after=said)
def test_one_liar_of_five_makes_no_bad_release_pass(before: Said, after: Said) -> None:
    bad = cohort(
        new=_with_liar(figures(shares(1, [0.1] * 5), spreads(1, [20.0] * 5)), after),
        old=_with_liar(figures(shares(2, [0.01] * 5), spreads(2, [10.0] * 5)), before),
    )
    for soaked in (False, True):
        found = verdicts(bad, soaked=soaked)
        assert Verdict.PASS not in {found[gate].verdict for gate in MEASURED}


def test_liars_that_are_honest_in_all_but_one_thing_do_not_hide_a_slow_or_failing_release() -> None:
    """A latency of 0, or no error ever, of one device: the four others fail the gate."""
    failing = figures([*shares(1, [0.15] * 4), *shares(2, [0.0])], spreads(1, [10.0] * 5))
    assert verdicts(cohort(new=failing))["error_rate"].verdict is Verdict.FAIL
    slow = figures(shares(1, [0.01] * 5), [*spreads(1, [25.0] * 4), *spreads(2, [1e-3])])
    assert verdicts(cohort(new=slow))["p95_ratio"].verdict is Verdict.FAIL

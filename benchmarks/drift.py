"""Alarms of drift on sketches drawn at random: how often samples without a shift raise one, with inputs that repeat and
without, and how often a shift does.

``KEDGE_DRIFT_DRAWS`` sets how many are drawn (1000).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from tests.support.drawn_sketches import shifts

from benchmarks.harness import Result

DRAWS = int(os.environ.get("KEDGE_DRIFT_DRAWS", "1000"))
CASES = (
    ("188 samples of 80 pictures", 80, 188),
    ("188 different samples", 0, 188),
    ("2000 samples of 80 pictures", 80, 2000),
    ("2000 different samples", 0, 2000),
)


def run() -> Iterator[Result]:
    """The table, and the goals: hardly a false alarm, and shifts are told."""
    print("| samples | count | false alarms | without counting repeats | alarms, values x1.5 | values x3 |")
    print("|" + "---|" * 6)
    for name, pictures, samples in CASES:
        well = [shifts(turn, pictures=pictures, samples=samples) for turn in range(DRAWS)]
        count = sum(judged.effective for judged, _ in well) / DRAWS
        false, blind = (sum(pair[place].alarms for pair in well) / DRAWS for place in (0, 1))
        told = [_told(pictures, samples, scale) for scale in (1.5, 3.0)]
        print(f"| {name} | {count:.0f} | {false:.3f} | {blind:.3f} | {told[0]:.3f} | {told[1]:.3f} |", flush=True)
        yield Result(f"drift: false alarms, {name}", "sketches", "", false, None, "", "≤0.01", false <= 0.01)
        yield Result(f"drift: values x3, {name}", "sketches", "alarms", told[1], None, "", "≥0.9", told[1] >= 0.9)


def _told(pictures: int, samples: int, scale: float) -> float:
    """Share of draws whose shifted values raise an alarm."""
    found = [shifts(turn, pictures=pictures, samples=samples, scale=scale)[0] for turn in range(DRAWS)]
    return sum(one.alarms for one in found) / DRAWS

"""Guesses of the next tokens from where the last ones occurred before."""

from __future__ import annotations

import random
from collections.abc import Callable

from kedge_agent.generation.lookup import LONGEST, PromptLookup, StepTimes


def times(cost: Callable[[int], float]) -> StepTimes:
    """Of steps that were measured for every number of positions."""
    found = StepTimes()
    for positions in range(1, LONGEST + 2):
        for _ in range(3):
            found.add(positions, cost(positions))
    return found


def written(lookup: PromptLookup, answer: list[int]) -> tuple[int, int]:
    """Write an answer as the engine does it; the numbers of steps and of positions in them."""
    at, steps, positions = 0, 0, 0
    lookup.add(answer[0])
    while at + 1 < len(answer):
        guessed = lookup.guess(len(answer) - at - 2)
        following = answer[at + 1 : at + 1 + len(guessed)]
        right = next((n for n, (one, other) in enumerate(zip(guessed, following)) if one != other), len(guessed))  # noqa: B905
        for token in answer[at + 1 : at + 2 + right]:
            lookup.add(token)
        at, steps, positions = at + 1 + right, steps + 1, positions + 1 + len(guessed)
    return steps, positions


def test_what_followed_the_last_tokens_before_is_guessed() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 9, 1, 2], times(lambda positions: 1.0))
    lookup.add(3)
    assert lookup.guess(2) == [4, 5]


def test_the_latest_occurrence_counts_and_the_last_tokens_are_none() -> None:
    lookup = PromptLookup([1, 2, 3, 7, 1, 2, 3, 8, 1, 2, 3], times(lambda positions: 1.0))
    assert lookup.guess(1) == [8]
    assert PromptLookup([1, 2, 3], times(lambda positions: 1.0)).guess(3) == []


def test_a_text_that_goes_in_a_circle_is_guessed_on() -> None:
    assert PromptLookup([1, 2, 3, 1, 2, 3, 1], times(lambda positions: 1.0)).guess(5) == [2, 3, 1, 2, 3]


def test_no_more_is_guessed_than_is_of_use() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2], times(lambda positions: 1.0))
    assert lookup.guess(1) == [3]
    assert lookup.guess(0) == []


def test_a_copied_text_takes_a_fraction_of_the_steps() -> None:
    draw = random.Random(1)
    text = [draw.randrange(1000) for _ in range(200)]
    steps, _ = written(PromptLookup(text, times(lambda positions: 1 + 0.1 * positions)), text)
    assert steps <= 0.25 * len(text)


def test_guesses_that_do_not_come_true_cost_two_hundredths_at_most() -> None:
    # Pairs and threes occur again and again, and what follows them is drawn anew each time.
    draw = random.Random(2)
    prompt, answer = ([draw.randrange(4) for _ in range(500)] for _ in range(2))
    cost = {positions: 1 + 0.8 * (positions - 1) for positions in range(1, LONGEST + 2)}
    lookup = PromptLookup(prompt, times(cost.__getitem__))
    steps, positions = written(lookup, answer)
    spent = steps + 0.8 * (positions - steps)
    assert spent <= 1.02 * len(answer)


def test_guesses_come_back_where_the_text_begins_to_repeat() -> None:
    draw = random.Random(3)
    noise = [draw.randrange(6) for _ in range(300)]
    copied = [100 + at for at in range(200)]
    lookup = PromptLookup(copied + noise, times(lambda positions: 1 + 0.15 * (positions - 1)))
    written(lookup, [draw.randrange(6) for _ in range(300)])
    steps, _ = written(lookup, copied)
    assert steps <= 0.5 * len(copied)


def test_a_first_step_that_was_disturbed_switches_nothing_off() -> None:
    found = StepTimes()
    for _ in range(50):
        found.add(1, 1.0)
    found.add(2, 30.0)
    assert found.relative()[1] < 1.5
    found.add(2, 1.2)
    found.add(2, 1.1)
    assert found.relative()[1] == 1.1


def test_a_disturbed_step_is_soon_forgotten_and_slower_steps_are_noticed() -> None:
    found = times(lambda positions: float(positions))
    found.add(2, 50.0)
    assert found.relative()[1] <= 2.2
    for _ in range(60):
        found.add(2, 6.0)
    assert found.relative()[1] == 6.0

"""Guesses the next tokens of an answer from where its last tokens occurred before, in the prompt or the answer itself
(Saxena, "Prompt Lookup Decoding", 2023). One step of several positions verifies them.

How many are guessed follows from two measurements: how often the token that followed before follows again, which costs
nothing to watch, and the time of a step by its number of positions. Where guesses do not pay there are none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

LONGEST = 7
"""Largest number of guessed tokens."""
_SIZES = (3, 2)
"""Numbers of last tokens that are looked up, in this order."""
_SHARE = 0.5
"""Share of tokens that follow again as before, until some were seen."""
_WEIGHT = 0.15
"""Weight of the last token in that share."""
_PRIOR = 0.2
"""Time of a further position relative to a step's first, until it is measured."""
_DRIFT = 1.05
"""Factor by which a measured time may grow at each further measurement: a step that was disturbed counts little."""
_TRUSTED = 3
"""Measurements from which on a time counts: on a busy device the least of many is far below the least of one."""


class StepTimes:
    """Processor times of a session's steps for one sequence, by the number of positions."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: Counter[int] = Counter()
        self._relative: list[float] = []

    def add(self, positions: int, seconds: float) -> None:
        """Add a measurement."""
        before = self._seconds.get(positions)
        self._seconds[positions] = seconds if before is None else min(seconds, before * _DRIFT)
        self._counts[positions] += 1
        self._relative.clear()

    def relative(self) -> Sequence[float]:
        """Return the times of steps of 1, 2 and so on up to :data:`LONGEST` + 1 positions, relative to the first."""
        found = self._relative
        if not found:
            nearest, time, known = 1, 1.0, self._counts[1] >= _TRUSTED
            for positions in range(1, LONGEST + 2):
                if known and self._counts[positions] >= _TRUSTED:
                    nearest, time = positions, max(self._seconds[positions] / self._seconds[1], 1.0)
                found.append(time + _PRIOR * (positions - nearest))
        return found


class PromptLookup:
    """Guesses for one answer. What was said is looked through when a guess is asked for: neither the first token of an
    answer waits for it, nor do answers that are written beside others.

    Args:
        prompt: its tokens.
        times: of the session's steps; shared by all answers.
    """

    def __init__(self, prompt: Sequence[int], times: StepTimes) -> None:
        self._times = times
        self._prompt = prompt
        self._added: list[int] = []
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}
        self._shares = dict.fromkeys(_SIZES, _SHARE)
        self._size = 0
        self._end = 0

    def add(self, token: int) -> None:
        """Add the next token of the answer."""
        self._added.append(token)

    def guess(self, most: int) -> list[int]:
        """Return up to ``most`` tokens that may follow; none if guesses do not pay."""
        self._catch_up()
        if not self._size:
            return []
        share, chance, expected = self._shares[self._size], 1.0, 1.0
        best, speed = 0, 1.0
        for count, time in enumerate(self._times.relative()[1 : max(most, 0) + 1], 1):
            chance *= share
            expected += chance
            if expected > speed * time:
                best, speed = count, expected / time
        # A text that repeats itself goes on where the last tokens begin.
        tokens, end = self._tokens, self._end
        return [tokens[end + at % (len(tokens) - end)] for at in range(best)]

    def _catch_up(self) -> None:
        if self._prompt:
            for token in self._prompt:
                self._enter(token)
            self._prompt = ()
            self._find()
        for token in self._added:
            if self._size:
                right = self._tokens[self._end] == token
                self._shares[self._size] += _WEIGHT * (right - self._shares[self._size])
            self._enter(token)
            self._find()
        self._added.clear()

    def _enter(self, token: int) -> None:
        # What ends at the last token is entered with the next one: looked up, it finds an earlier occurrence.
        tokens, ends = self._tokens, self._ends
        end = len(tokens)
        for size in _SIZES:
            if end >= size:
                ends[tuple(tokens[-size:])] = end
        tokens.append(token)

    def _find(self) -> None:
        """Find the last tokens' latest occurrence before themselves."""
        self._size = 0
        for size in _SIZES:
            end = self._ends.get(tuple(self._tokens[-size:]))
            if end is not None:
                self._size, self._end = size, end
                return

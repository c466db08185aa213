"""What an engine counts while it writes; read by ``/metrics``."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the histogram of times to the first token, seconds; a last bucket has none."""


@dataclass
class GenerationStatistics:
    """The sums of one engine. Its thread alone writes them; readers may see one count without the next.

    Attributes:
        ended: answers by the reason of their end; ``failed`` for those that ended with an error.
        prompt_tokens: tokens of all prompts; ``cached_tokens`` of them were not read anew.
        written_tokens: tokens of all answers.
        guessed_tokens: tokens that were guessed before they were written; ``right_tokens`` of them came true.
        writing_seconds: sum of the times from an answer's first token to its end.
        first_tokens: histogram of the times from a request to its first token, see :data:`FIRST_TOKEN_BOUNDS`.
        first_token_seconds: their sum.
    """

    ended: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written_tokens: int = 0
    guessed_tokens: int = 0
    right_tokens: int = 0
    writing_seconds: float = 0.0
    first_tokens: list[int] = field(default_factory=lambda: [0] * (len(FIRST_TOKEN_BOUNDS) + 1))
    first_token_seconds: float = 0.0

    def begin(self, prompt: int, cached: int) -> None:
        """Count a prompt."""
        self.prompt_tokens += prompt
        self.cached_tokens += cached

    def first(self, seconds: float) -> None:
        """Count a first token, this long after the request."""
        self.first_tokens[next((at for at, most in enumerate(FIRST_TOKEN_BOUNDS) if seconds <= most), -1)] += 1
        self.first_token_seconds += seconds

    def end(self, reason: str, seconds: float) -> None:
        """Count an answer's end, this long after its first token."""
        self.ended[reason] += 1
        self.writing_seconds += seconds

"""Requests to the engine of a language model, and the running answers that it gives for them."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

import numpy.typing as npt

from kedge_agent.generation.reading import Reading
from kedge_agent.generation.sampling import Sampling
from kedge_protocol.bundle.generation import AnswerRules
from kedge_protocol.errors import InputError, KedgeError

Array = npt.NDArray[Any]

STOP = "stop"
LENGTH = "length"
CANCELLED = "cancelled"
TIMEOUT = "timeout"
FAILED = "failed"


class BusyError(KedgeError):
    """The queue is full."""


class Follower(Protocol):
    """Says which tokens may follow in one answer; see :class:`kedge_agent.generation.constraint.Matcher`."""

    def allowed(self, logits: Array) -> Array:
        """Return logits with minus infinity for tokens that may not follow."""

    def take(self, token: int) -> bool:
        """Take the next token, and return whether the answer is complete."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """A request to the engine.

    Attributes:
        prompt: tokens of the prompt, at least one.
        reading: what the encoder reads; None for a decoder alone.
        rules: which tokens may follow.
        max_tokens: largest number of tokens of the answer.
        end_tokens: tokens that end the answer and are not part of it.
        top_log_probabilities: number of alternatives returned with each token; None for no log-probabilities.
        seconds: time after which the answer is cut off; None for no limit.
        matcher: what the answer has to match; None for any text.
        whole: whether the tokens are handed over at the end, all at once: waking a reader for each costs as much as a
            small model's step.

    Raises:
        InputError: a number is none, or out of range.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: frozenset[int] = frozenset()
    top_log_probabilities: int | None = None
    seconds: float | None = None
    matcher: Follower | None = None
    whole: bool = False
    reading: Reading | None = None
    rules: AnswerRules = field(default_factory=AnswerRules)

    def __post_init__(self) -> None:
        # Before the engine has it: there a wrong type would fail everybody's step.
        tops, seconds = self.top_log_probabilities, self.seconds
        tests = (
            ("prompt", all(_is_whole(one, 0) for one in self.prompt), "a list of tokens"),
            ("max_tokens", _is_whole(self.max_tokens, 1), "a whole number from 1 on"),
            ("log_probabilities", tops is None or _is_whole(tops, 0), "a whole number from 0 on"),
            ("seconds", seconds is None or _is_time(seconds), "a number from 0 on"),
        )
        for where, holds, what in tests:
            if not holds:
                raise InputError(f"is not {what}", where=where)

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens that are read."""
        return len(self.prompt) + (0 if self.reading is None else self.reading.tokens)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and int(value) >= least


def _is_time(value: Any) -> bool:
    return isinstance(value, Real) and float(value) >= 0


@dataclass(frozen=True)
class Token:
    """One token of an answer, with its natural log-probability and the most likely tokens if they were requested."""

    id: int
    log_probability: float | None = None
    top: Sequence[tuple[int, float]] = ()


@dataclass
class Ticket:
    """A running answer; iterate over it for the tokens.

    Attributes:
        reason: why the answer ended (:data:`STOP`, :data:`LENGTH`, :data:`CANCELLED`, :data:`TIMEOUT`); empty while it
            runs.
        cached: number of the prompt's tokens that were already in the cache.
        written_at, last_at: when the engine wrote the first token and the last one, by the monotonic clock; None
            before. ``written`` is their number.
    """

    order: Order
    reason: str = ""
    cached: int = 0
    begun: float = field(default_factory=time.monotonic)
    written_at: float | None = None
    last_at: float | None = None
    written: int = 0
    _events: queue.SimpleQueue[Token | str | Exception] = field(default_factory=queue.SimpleQueue)
    _cancelled: bool = False
    _held: list[Token] = field(default_factory=list)

    def __iter__(self) -> Iterator[Token]:
        """Yield each token as it comes.

        Raises:
            KedgeError: the engine was closed, or the runtime failed.
        """
        while not self.reason:
            event = self._events.get()
            if isinstance(event, Exception):
                self.reason = CANCELLED
                raise event
            if isinstance(event, str):
                self.reason = event
            else:
                yield event

    def cancel(self) -> None:
        """Cancel the answer; its slot is free after the current step."""
        self._cancelled = True

    @property
    def over(self) -> str:
        """Return why no further token may be written, or an empty text if one may."""
        if self._cancelled:
            return CANCELLED
        most = self.order.seconds
        return TIMEOUT if most is not None and time.monotonic() - self.begun > most else ""

    def put(self, event: Token | str | Exception) -> None:
        """Queue an event for the iterating thread."""
        if self.order.whole and isinstance(event, Token):
            self._held.append(event)
            return
        for token in self._held:
            self._events.put(token)
        self._held.clear()
        self._events.put(event)

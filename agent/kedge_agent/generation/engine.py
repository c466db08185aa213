"""The generation engine: one thread runs a decoder's slots. It takes requests from a queue, prefills prompts in chunks
between decoding steps, and decodes one token of all running answers in one step. A single answer gets several in one
step where guesses from its text come true (:mod:`kedge_agent.generation.lookup`).

A slot keeps its tokens when its answer is done; the next prompt with the same beginning reuses them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt

from kedge_agent.generation.lookup import PromptLookup, StepTimes
from kedge_agent.generation.rules import allowed, is_free
from kedge_agent.generation.sampling import Sampler, log_probabilities
from kedge_agent.generation.statistics import GenerationStatistics
from kedge_agent.generation.tickets import (
    FAILED,
    LENGTH,
    STOP,
    TIMEOUT,
    BusyError,
    Order,
    Ticket,
    Token,
)
from kedge_protocol.errors import InputError, KedgeError, NeighbourError
from kedge_targets.decoder.session import DecoderSession

Array = npt.NDArray[Any]

log = logging.getLogger("kedge.generation")

CHUNK = 128
"""Tokens of a prompt that are prefilled between two decoding steps."""
QUEUE = 64
_TIMED = 4
"""Of so many steps without guesses the time of one is measured."""


@dataclass
class _Slot:
    """The state of one of the session's slots.

    Attributes:
        tokens: the tokens in the cache.
        reading: the digest of what they are about; empty for a decoder alone.
        left: the prompt's tokens that are not prefilled yet.
        next: the picked token that is not in the cache yet.
        lookup: guesses the tokens after it; None where nothing is guessed.
    """

    index: int
    tokens: list[int] = field(default_factory=list)
    ticket: Ticket | None = None
    sampler: Sampler | None = None
    reading: bytes = b""
    left: list[int] = field(default_factory=list)
    next: int | None = None
    lookup: PromptLookup | None = None
    written: int = 0
    used_at: int = 0


class Engine:
    """Runs a decoder session; requests may come from any thread.

    Args:
        session: owned by the engine from now on.
        queue_limit: largest number of answers that wait for a slot.
        guesses: whether tokens are guessed from what stands in the prompt and the answer already.

    Attributes:
        statistics: what was written since the engine began.
    """

    def __init__(self, session: DecoderSession, *, queue_limit: int = QUEUE, guesses: bool = True) -> None:
        self._session = session
        self._guesses = guesses
        self._times = StepTimes()
        self._limit = queue_limit
        self._slots = [_Slot(index) for index in range(session.slots)]
        self._waiting: list[Ticket] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._until = math.inf
        self._clock = 0
        self._beginning: Ticket | None = None
        """On its way from the queue to a slot."""
        self.statistics = GenerationStatistics()

    @property
    def running(self) -> int:
        """Return the number of answers that have a slot."""
        return sum(slot.ticket is not None for slot in self._slots)

    @property
    def positions(self) -> int:
        """Return the number of positions in use in all slots."""
        return int(self._session.lengths.sum())

    @property
    def session(self) -> DecoderSession:
        """Return the session that the engine runs."""
        return self._session

    @property
    def waiting(self) -> int:
        """Return the number of answers that have no slot yet."""
        return len(self._waiting)

    @property
    def answers(self) -> int:
        """Return the number of answers that run or wait; one that is on its way from the queue to a slot counts."""
        with self._changed:
            return self.running + self.waiting + (self._beginning is not None)

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of the caches of all slots that are in this process."""
        return self._session.cache_bytes

    def known(self, prompt: Sequence[int]) -> int:
        """Return how many of a prompt's first tokens a slot holds."""
        return max(_common(slot.tokens, prompt) for slot in self._slots)

    def submit(self, order: Order) -> Ticket:
        """Queue a request for an answer.

        Raises:
            InputError: the prompt is empty or longer than the context, a token is outside the vocabulary, or the engine
                is closed.
            BusyError: too many answers already wait.
        """
        session = self._session
        if not order.prompt:
            raise InputError("the prompt is empty", remedy="Give at least one token")
        if len(order.prompt) >= session.context:
            raise InputError(
                f"the prompt has {len(order.prompt)} tokens, the context {session.context}: there is no room for an "
                "answer",
                remedy="Give a shorter prompt, or compile with a larger --context",
            )
        if min(order.prompt) < 0 or max(order.prompt) >= session.vocabulary:
            raise InputError(f"a token lies outside the vocabulary of {session.vocabulary}")
        if order.reading is not None:
            session.check_source(order.reading.values)
        elif session.has_encoder:
            raise InputError("there is nothing for the encoder to read")
        ticket = Ticket(order)
        with self._changed:
            if self._closed:
                raise InputError("the model was closed")
            if len(self._waiting) >= self._limit:
                raise BusyError(f"{len(self._waiting)} answers wait already", remedy="Come again later")
            self._waiting.append(ticket)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kedge-generation", daemon=True)
                self._thread.start()
            self._changed.notify_all()
        return ticket

    def retire(self, seconds: float) -> None:
        """Cut off after some seconds what still runs or waits then, with the reason :data:`TIMEOUT`."""
        self._until = time.monotonic() + seconds

    def close(self) -> None:
        """End all answers, and release the session."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        elif thread is None:
            self._session.close()

    def _run(self) -> None:
        while self._wait():
            try:
                self._turn()
            except NeighbourError as error:
                log.error("%s", error)
                self._fail(error)
            except Exception as error:
                # Whatever a runtime may raise: these answers fail, later ones may not.
                log.exception("a step failed")
                self._fail(_told(error))
        self._fail(InputError("the model was closed"))
        self._session.close()

    def _wait(self) -> bool:
        """Wait until there is something to do; return False if the engine is closed."""
        if self._idle():
            with self._changed:
                while not self._closed and self._idle():
                    self._changed.wait()
        return not self._closed

    def _idle(self) -> bool:
        return not self._waiting and all(slot.ticket is None for slot in self._slots)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            running = [slot.ticket for slot in self._slots if slot.ticket is not None]
            if self._beginning is not None and all(one is not self._beginning for one in running):
                running.append(self._beginning)
            # None is told before this: who asks again at once is not among them.
            tickets = [*running, *self._waiting]
            self._waiting.clear()
            self._beginning = None
        # Those without an answer too: what failed may be what holds their cache.
        for slot in self._slots:
            self._forget(slot)
        for ticket in tickets:
            self._ended(ticket, FAILED)
            ticket.put(error)

    def _forget(self, slot: _Slot) -> None:
        """Empty a slot whose cache may be invalid."""
        slot.ticket = slot.sampler = slot.lookup = slot.next = None
        slot.tokens, slot.left, slot.reading = [], [], b""
        with contextlib.suppress(Exception):
            self._session.truncate(slot.index, 0)

    def _turn(self) -> None:
        """Admit waiting requests, prefill a chunk of one prompt, decode a token of every answer."""
        self._clock += 1
        if self._waiting:
            self._admit()
        for slot in self._slots:
            if slot.ticket is not None and (reason := self._over(slot.ticket)):
                self._done(slot, reason)
        reading = next((slot for slot in self._slots if slot.left), None)
        if reading is not None:
            self._read(reading)
        writing = [slot for slot in self._slots if slot.ticket is not None and slot.next is not None]
        if len(writing) == 1:
            self._advance(writing[0])
        elif writing:
            found = self._session.step({slot.index: slot.next for slot in writing if slot.next is not None})
            for slot in writing:
                self._wrote(slot, found[slot.index])

    def _advance(self, slot: _Slot) -> None:
        """Decode the next token of a single answer, and those after it that were guessed."""
        ticket, token = slot.ticket, slot.next
        if ticket is None or token is None:
            return
        guessed: list[int] = []
        if slot.lookup is not None:
            room = min(self._session.context - len(slot.tokens), ticket.order.max_tokens - slot.written)
            guessed = slot.lookup.guess(room - 1)
            there = len(slot.tokens) + 1
            if not all(self._session.can_keep(there + len(guessed), there + right) for right in range(len(guessed))):
                guessed = []  # wrong ones could not be taken back
        # By the processor: on a busy device the clock tells what others do. The clock itself costs a small model a
        # hundredth of a step.
        timed = slot.lookup is not None and (bool(guessed) or self._clock % _TIMED == 0)
        began = time.process_time() if timed else 0.0
        rows = self._session.extend(slot.index, [token, *guessed], keep=len(guessed) + 1)
        if timed:
            self._times.add(len(rows), time.process_time() - began)
        right = 0
        for logits, guess in zip(rows, [*guessed, None], strict=True):
            self._wrote(slot, logits)
            if slot.ticket is None or slot.next != guess:
                break
            right += 1
        if guessed:
            self._session.truncate(slot.index, len(slot.tokens))
            self.statistics.guessed_tokens += len(guessed)
            self.statistics.right_tokens += right

    def _wrote(self, slot: _Slot, logits: Array) -> None:
        """Take the token that was written into the cache, and pick the next."""
        if slot.next is not None:
            slot.tokens.append(slot.next)
        self._pick(slot, logits)

    def _admit(self) -> None:
        if self._waiting and not self.running and not self._session.ready():
            for slot in self._slots:
                self._forget(slot)
        while True:
            free = [slot for slot in self._slots if slot.ticket is None]
            with self._changed:
                ticket = self._waiting.pop(0) if free and self._waiting else None
                self._beginning = ticket
            if ticket is None:
                return
            if reason := self._over(ticket):
                self._ended(ticket, reason)
                ticket.put(reason)
                continue
            self._begin(ticket, free)
            self._beginning = None

    def _over(self, ticket: Ticket) -> str:
        return ticket.over or (TIMEOUT if time.monotonic() > self._until else "")

    def _begin(self, ticket: Ticket, free: list[_Slot]) -> None:
        order = ticket.order
        prompt, key = list(order.prompt), b"" if order.reading is None else order.reading.key

        def common(one: _Slot) -> int:
            if one.reading != key:
                return -1
            # The last token is read anew: its logits are wanted.
            found = min(_common(one.tokens, prompt), len(prompt) - 1)
            return found if self._session.can_keep(len(one.tokens), found) else 0

        slot = max(free, key=lambda one: (common(one), -one.used_at))
        best = max(self._slots, key=common)
        shared, own = common(best), common(slot)
        slot.ticket, slot.sampler = ticket, Sampler(order.sampling)
        slot.next, slot.written, slot.used_at = None, 0, self._clock
        slot.lookup = PromptLookup(prompt, self._times) if self._guesses else None
        if shared > own:
            self._session.copy(best.index, slot.index, shared)
        elif own >= 0:
            shared = own
            self._session.truncate(slot.index, own)
        else:
            shared = 0
            self._attend(slot, order)
        slot.reading, slot.tokens, slot.left = key, prompt[:shared], prompt[shared:]
        ticket.cached = shared
        self.statistics.begin(order.prompt_tokens, shared)

    def _attend(self, slot: _Slot, order: Order) -> None:
        """Let the encoder read for a slot. If that fails, nothing is left that could be taken for this source's."""
        slot.tokens, slot.left, slot.reading = [], [], b""
        self._session.truncate(slot.index, 0)
        if order.reading is not None:
            self._session.attend(slot.index, order.reading.values)

    def _read(self, slot: _Slot) -> None:
        chunk, slot.left = slot.left[:CHUNK], slot.left[CHUNK:]
        logits = self._session.extend(slot.index, chunk)
        slot.tokens += chunk
        if not slot.left:
            self._pick(slot, logits[0])

    def _pick(self, slot: _Slot, logits: Array) -> None:
        """Pick the next token of an answer, report it, and end the answer if it is the last."""
        ticket, sampler = slot.ticket, slot.sampler
        if ticket is None or sampler is None:
            return
        order, complete = ticket.order, False
        seen = slot.tokens if order.sampling.repetition_penalty != 1 else ()
        try:
            free = logits
            if not is_free(order.rules):
                free = allowed(order.rules, logits, slot.tokens, slot.written, order.end_tokens)
            token = sampler.pick(free if order.matcher is None else order.matcher.allowed(free), seen)
            if token in order.end_tokens:
                self._done(slot, STOP)
                return
            complete = order.matcher is not None and order.matcher.take(token)
        except InputError as error:
            self._forget(slot)
            self._ended(ticket, FAILED)
            ticket.put(error)
            return
        self._count(ticket)
        if order.top_log_probabilities is None:
            ticket.put(Token(token))
        else:
            own, top = log_probabilities(logits, token, order.top_log_probabilities)
            ticket.put(Token(token, own, top))
        slot.next = token
        slot.written += 1
        if slot.lookup is not None:
            slot.lookup.add(token)
        if complete:
            self._done(slot, STOP)
        elif slot.written >= order.max_tokens or len(slot.tokens) + 1 >= self._session.context:
            self._done(slot, LENGTH)

    def _done(self, slot: _Slot, reason: str) -> None:
        ticket = slot.ticket
        slot.ticket = slot.sampler = slot.lookup = slot.next = None
        slot.left = []
        slot.used_at = self._clock
        if ticket is not None:
            self._ended(ticket, reason)
            ticket.put(reason)

    def _count(self, ticket: Ticket) -> None:
        """Count a token that is about to be reported."""
        self.statistics.written_tokens += 1
        ticket.written += 1
        ticket.last_at = time.monotonic()
        if ticket.written_at is None:
            ticket.written_at = ticket.last_at
            self.statistics.first(ticket.written_at - ticket.begun)

    def _ended(self, ticket: Ticket, reason: str) -> None:
        began = ticket.written_at
        self.statistics.end(reason, 0.0 if began is None else time.monotonic() - began)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix of two sequences."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left != right:
            break
        count += 1
    return count


def _told(error: Exception) -> Exception:
    """Return what readers of an answer get for an error of a step."""
    return error if isinstance(error, KedgeError) else InputError(f"a step failed: {error}")

"""A loaded bundle that generates text."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kedge_agent.generation.constraint import FORMS, Constraint, Constraints, Matcher
from kedge_agent.generation.engine import Engine
from kedge_agent.generation.engines import Engines
from kedge_agent.generation.pieces import TextPieces, TokenBytes
from kedge_agent.generation.reading import Reading
from kedge_agent.generation.sampling import Sampling
from kedge_agent.generation.tickets import CANCELLED, STOP, Order, Ticket, Token
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.generation import Generation, Source
from kedge_protocol.errors import BundleError, InputError, MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install
from kedge_targets import registry
from kedge_targets.calls import plan as plans
from kedge_targets.decoder import tokenizing
from kedge_targets.decoder.chat_template import ChatTemplate, Message

if TYPE_CHECKING:
    from kedge_agent.split.settings import SplitSettings

MAX_STOP = 16


_OPTIONS = ("max_tokens", "stop", "log_probabilities", "seconds", "ignore_end")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A finished answer.

    Attributes:
        text: the text without the token or string that ended it.
        tokens: the generated tokens.
        reason: ``stop`` (an end token or a stop string), ``length`` (``max_tokens`` or the context), ``timeout`` or
            ``cancelled``.
        prompt_tokens: number of the prompt's tokens; ``cached_tokens`` of them were cached from an earlier one.
        log_probabilities: one entry per token if they were requested, otherwise empty.
        first_token_seconds, seconds: times of the first token and of the end, from the call on.
    """

    text: str
    tokens: tuple[int, ...]
    reason: str
    prompt_tokens: int
    cached_tokens: int
    log_probabilities: tuple[Token, ...] = ()
    first_token_seconds: float = 0.0
    seconds: float = 0.0


@dataclass
class AnswerStream:
    """An iterator over pieces of text as they come, for ``for`` and ``async for``; :attr:`answer` is set when they have
    ended."""

    _ticket: Ticket
    _pieces: TextPieces
    _ended: Callable[[bool], None]
    answer: Answer | None = None
    _parts: list[str] = field(default_factory=list)
    _tokens: list[Token] = field(default_factory=list)
    _iterator: Generator[str] | None = None
    _begun: bool = False

    def __iter__(self) -> Iterator[str]:
        """Iterate over the pieces; possible once."""
        if self._iterator is None:
            self._iterator = self._run()
        return self._iterator

    async def __aiter__(self) -> AsyncIterator[str]:
        """Iterate over the pieces without blocking the event loop."""
        import asyncio  # a quarter of a serving process's start, and only this needs it

        iterator = iter(self)
        while (piece := await asyncio.to_thread(next, iterator, None)) is not None:
            yield piece

    @property
    def tokens(self) -> Sequence[Token]:
        """Return all tokens so far."""
        return self._tokens

    @property
    def pace(self) -> tuple[float, float | None] | None:
        """Return the seconds to the first token and, with more than one, the mean of each after it, as the engine wrote
        them, however slowly they are read; None before the first."""
        ticket = self._ticket
        if ticket.written_at is None or ticket.last_at is None:
            return None
        each = (ticket.last_at - ticket.written_at) / (ticket.written - 1) if ticket.written > 1 else None
        return ticket.written_at - ticket.begun, each

    def close(self) -> None:
        """Cancel the answer, and let go of the model."""
        self._ticket.cancel()
        if self._iterator is not None and self._begun:
            # Another thread that waits for a token sees the end itself.
            with contextlib.suppress(ValueError):
                self._iterator.close()

    def finish(self) -> Answer:
        """Wait for the end, and return the answer."""
        for _ in self:
            pass
        if self.answer is None:
            raise InputError("the answer was read already and broken off")
        return self.answer

    def _run(self) -> Generator[str]:
        failed, self._begun = True, True
        try:
            for token in self._ticket:
                self._tokens.append(token)
                piece = self._pieces.add(token.id)
                if piece:
                    self._parts.append(piece)
                    yield piece
                if self._pieces.stopped:
                    self._ticket.cancel()
                    break
            rest = self._pieces.end()
            if rest:
                self._parts.append(rest)
                yield rest
            failed = False
        except (GeneratorExit, KeyboardInterrupt):
            failed = False  # nobody wants more of it
            raise
        finally:
            self._ticket.cancel()
            self.answer = self._made()
            # What is called holds the model, which may have been switched.
            ended, self._ended = self._ended, lambda failed: None
            ended(failed)

    def _made(self) -> Answer:
        ticket, now = self._ticket, time.monotonic()
        first = ticket.written_at if ticket.written_at is not None else now
        with_logs = ticket.order.top_log_probabilities is not None
        return Answer(
            text="".join(self._parts),
            tokens=tuple(token.id for token in self._tokens),
            reason=STOP if self._pieces.stopped else ticket.reason or CANCELLED,
            prompt_tokens=ticket.order.prompt_tokens,
            cached_tokens=ticket.cached,
            log_probabilities=tuple(self._tokens) if with_logs else (),
            first_token_seconds=first - ticket.begun,
            seconds=now - ticket.begun,
        )


class TextGenerator:
    """A bundle's decoder with its tokenizer, template and engine.

    Args:
        folder: the folder with the bundle's files, named by title.
        split: where the other parts of a split model are.
        cache: where it is kept how this device runs the bundle; None for as the bundle says.

    Raises:
        ConfigError: the model is split, and no device with its other layers is named.
        MissingDependencyError: the ``text`` extra or the runtime is not installed.
        BundleError: the tokenizer or the template is invalid.
        InputError: weights and caches do not fit into the device's memory.
        VerificationError: the runtime refuses the file.
    """

    one = None
    detail = ""

    def __init__(
        self, folder: Path, config: BundleConfig, split: SplitSettings | None = None, cache: Path | None = None
    ) -> None:
        if config.generation is None:
            raise InputError("the bundle writes no text", where=config.name)
        self.spec: Generation = config.generation
        self._name = config.name
        self.tokenizer = _tokenizer(folder / self.spec.tokenizer)
        self.token_bytes = TokenBytes(self.tokenizer)
        self._constraints: Constraints | None = None
        self.template: ChatTemplate | None = None
        if self.spec.template is not None:
            source = (folder / self.spec.template).read_text(encoding="utf-8")
            self.template = ChatTemplate(source, self.spec.special)
        plan = plans.read(cache, config)
        self.engine = self._engine(folder, config, split, plan)
        declared = config.resources.memory_bytes
        self.figures: Mapping[str, float] = {
            "cache_bytes": self.engine.cache_bytes,
            "memory_bytes": declared,
            **({} if plan is None else plan.options_figures),
        }

    def _engine(
        self, folder: Path, config: BundleConfig, split: SplitSettings | None, plan: plans.CallPlan | None
    ) -> Engine | Engines:
        if self.spec.part is not None:
            from kedge_agent.split import whole
            from kedge_agent.split.settings import SplitSettings

            return whole.engines(folder, config, self.spec, self.spec.part, split or SplitSettings())
        session = registry.runtime(config.backend).load_decoder(
            folder / config.entry, plans.options(plan, config), slots=self.spec.slots, context=self.spec.context
        )
        return Engine(session)

    def tokens(self, prompt: str | Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Return a prompt's tokens: a plain text after the model's begin token, or messages rendered by its chat
        template.

        Raises:
            InputError: it is neither; or messages are given, and the model has no chat template or its template refuses
                them.
        """
        if isinstance(prompt, str):
            begin = [] if self.spec.begin_token is None else [self.spec.begin_token]
            return begin + self._ids(prompt)
        given: Any = prompt
        if isinstance(given, bytes) or not isinstance(given, Sequence):
            raise InputError("is neither a text nor a list of messages", where="prompt")
        if self.template is None:
            raise InputError(
                "the model has no chat template", where=self._name, remedy="Give a plain text for it to go on with"
            )
        return self._ids(self.template.render(prompt, tools=tools))

    def _ids(self, text: str) -> list[int]:
        try:
            return list(self.tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError as error:  # the library takes what UTF-8 can say
            raise InputError("the text holds half a character (a lone surrogate)", where="prompt") from error

    def prepared(self, prompt: str | Sequence[Message], options: Mapping[str, Any]) -> tuple[list[int], dict[str, Any]]:
        """Return the decoder's prompt and the options of :meth:`stream` for a prompt.

        Args:
            options: those of :meth:`stream`; for a model that reads a text with an encoder also ``task``, whose prefix
                is put before it, and ``language``, into which it is translated.

        Raises:
            InputError: see :meth:`tokens`; or a task or language is not known, or the model hears and does not read.
        """
        source = self.spec.source
        if source is None:
            return self.tokens(prompt), dict(options)
        if source.speech is not None or not isinstance(prompt, str):
            remedy = "Give it a text" if source.speech is None else "Call the model with a sound"
            raise InputError("the model does not take this prompt", where=self._name, remedy=remedy)
        others = dict(options)
        text = self._asked(source, others.pop("task", None), others.pop("language", None)) + prompt
        tokens = self._ids(text)
        if source.end_token is not None:
            tokens.append(source.end_token)
        begin, reading = self.from_tokens(tokens)
        return begin, {**others, **reading}

    def from_tokens(self, tokens: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
        """Return the decoder's prompt and further options of :meth:`stream` for the tokens of a prompt: a decoder goes
        on with them, an encoder reads them."""
        if self.spec.source is None:
            return list(tokens), {}
        return list(self.spec.source.begin_tokens), {"reading": Reading.of(np.array(tokens, np.int64))}

    def _asked(self, source: Source, task: Any, language: Any) -> str:
        """Return what is put before a text."""
        if task is not None and task not in source.prefixes:
            known = ", ".join(source.prefixes) or "none: write it into the text"
            raise InputError(f"the task {task!r} is not known", where="task", remedy=f"Known are {known}")
        mark = f">>{language}<< "
        if language is not None and self.tokenizer.token_to_id(mark.strip()) is None:
            raise InputError(f"the model has no token {mark.strip()}", where="language")
        return ("" if language is None else mark) + ("" if task is None else source.prefixes[task])

    def stream(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int = 200,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] = (),
        log_probabilities: int | None = None,
        seconds: float | None = None,
        ignore_end: bool = False,
        constraint: Constraint | None = None,
        reading: Reading | None = None,
        whole: bool = False,
        ended: Callable[[bool], None] = lambda failed: None,
    ) -> AnswerStream:
        """Start an answer.

        Args:
            reading: what the encoder reads, for a model with one.
            whole: whether nothing is read before the end; with ``stop`` the text is watched all the same.
            ended: called at the end with whether the answer failed.

        Raises:
            InputError: see :meth:`kedge_agent.generation.engine.Engine.submit`; or ``stop`` or the constraint is
                invalid.
            MissingDependencyError: there is a constraint, and llguidance is not installed.
            BusyError: too many answers already wait.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Sequence) else (None,)
        if len(stops) > MAX_STOP or not all(isinstance(one, str) and one for one in stops):
            raise InputError(f"is not up to {MAX_STOP} texts, none of them empty", where="stop")
        rules, how = self.spec.rules, sampling or Sampling()
        if how.repetition_penalty == 1:
            how = replace(how, repetition_penalty=rules.repetition_penalty)
        order = Order(
            prompt=tokens,
            max_tokens=max_tokens,
            sampling=how,
            reading=reading,
            rules=rules,
            end_tokens=frozenset() if ignore_end else frozenset(self.spec.end_tokens),
            top_log_probabilities=log_probabilities,
            seconds=seconds,
            whole=whole and not stops,
            matcher=None if constraint is None else self._matcher(constraint, ignore_end=ignore_end),
        )
        after = tokens[-1] if tokens and reading is None else None
        return AnswerStream(self.engine.submit(order), TextPieces(self.tokenizer, stops, after=after), ended)

    def _matcher(self, constraint: Constraint, *, ignore_end: bool) -> Matcher:
        if ignore_end:
            raise InputError("a constrained answer ends where the constraint is met", where="ignore_end")
        if self._constraints is None:
            vocabulary = self.engine.session.vocabulary
            self._constraints = Constraints(self.tokenizer.to_str(), vocabulary, self.spec.end_tokens)
        return self._constraints.matcher(constraint)

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse; see :meth:`in_order`."""
        raise self.refusal()

    def in_order(self, raw: Mapping[str, Any]) -> list[Any]:
        """Refuse: a language model does not take arrays.

        Raises:
            InputError: always.
        """
        raise self.refusal()

    def run(self, raw: Sequence[Any]) -> list[Any]:
        """Refuse; see :meth:`in_order`."""
        raise self.refusal()

    def refusal(self) -> InputError:
        """Return the error of a call with arrays."""
        return InputError("this model writes text", where=self._name, remedy="Call Model.generate(text)")

    def close(self) -> None:
        """End all answers and release the model."""
        self.engine.close()


def check_options(options: Mapping[str, Any]) -> None:
    """Raise :class:`InputError` for an option of an answer that is not known."""
    unknown = sorted(set(options) - {*_OPTIONS, "reading"})
    if unknown:
        known = ", ".join(sorted({*_OPTIONS, *FORMS, *(one.name for one in fields(Sampling))}))
        raise InputError(
            f"the option {unknown[0]!r} is not known to this model", where="generate", remedy=f"Known are {known}"
        )


def _tokenizer(path: Path) -> Any:
    try:
        return tokenizing.opened(path)
    except ImportError as error:
        raise MissingDependencyError(
            f"tokenizers cannot be loaded: {error}", remedy=f"Install it with {pip_install('text', of=AGENT)}"
        ) from error
    except Exception as error:  # the library raises Exception itself
        raise BundleError(f"the tokenizer is refused: {error}", where=path.name) from error

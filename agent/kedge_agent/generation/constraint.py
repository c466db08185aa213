"""Constrains answers to a JSON schema, a regular expression or a grammar, by llguidance (the ``structured`` extra)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install

Array = npt.NDArray[Any]

MAX_CHARACTERS = 1 << 17
"""Size of a schema or grammar; the time of its compilation grows with it."""
FORMS = ("json_schema", "regex", "grammar")
"""Options of a call that constrain its answer."""


@dataclass(frozen=True)
class Constraint:
    """What an answer has to match as a whole.

    Attributes:
        form: ``json_schema``, ``regex`` (Rust's syntax) or ``grammar`` (Lark's syntax as llguidance reads it).
        text: the schema as JSON, the expression or the grammar.
    """

    form: str
    text: str


def from_options(options: Mapping[str, Any]) -> tuple[Constraint | None, dict[str, Any]]:
    """Split a call's options into the constraint and the others.

    Args:
        options: at most one of ``json_schema`` (a mapping, or True for any object), ``regex`` and ``grammar``.

    Raises:
        InputError: there are several, or one has the wrong type or size.
    """
    given = {form: options[form] for form in FORMS if options.get(form) is not None}
    others = {name: value for name, value in options.items() if name not in FORMS}
    if not given:
        return None, others
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)} exclude each other", where="generate")
    form, value = next(iter(given.items()))
    return make(form, value), others


def make(form: str, value: Any) -> Constraint:
    """Return a constraint.

    Raises:
        InputError: the value has the wrong type or size.
    """
    if form == "json_schema":
        schema = {"type": "object"} if value is True else value
        if not isinstance(schema, Mapping):
            raise InputError("a JSON schema, as a mapping, was expected", where=form)
        try:
            text = json.dumps(schema, ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the schema is not JSON: {error}", where=form) from error
    else:
        text = value
    if not isinstance(text, str) or not text:
        raise InputError("a text was expected", where=form)
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"has {len(text)} characters, more than {MAX_CHARACTERS}", where=form)
    return Constraint(form, text)


class Constraints:
    """Compiles constraints for one tokenizer.

    Args:
        tokenizer: the content of ``tokenizer.json``.
        vocabulary: number of the model's logits.
        end_tokens: tokens that end an answer; the first of them may be written where the constraint is met.

    Raises:
        MissingDependencyError: llguidance is not installed.
        InputError: llguidance cannot read the tokenizer.
    """

    def __init__(self, tokenizer: str, vocabulary: int, end_tokens: Sequence[int]) -> None:
        try:
            import llguidance
        except ImportError as error:
            raise MissingDependencyError(
                f"answers cannot be constrained: {error}",
                where="llguidance",
                remedy=f"Install it with {pip_install('structured', of=AGENT)}",
            ) from error
        self._library: Any = llguidance
        self._vocabulary = vocabulary
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer, eos_token=list(end_tokens) or None)
        except Exception as error:  # the library raises what its parser does
            raise InputError(
                f"llguidance cannot read the tokenizer: {error}",
                where="tokenizer.json",
                remedy="Ask without a constraint",
            ) from error

    def matcher(self, constraint: Constraint) -> Matcher:
        """Compile a constraint for one answer.

        Raises:
            InputError: the schema, expression or grammar is wrong or too complex.
        """
        matcher = self._library.LLMatcher
        try:
            if constraint.form == "json_schema":
                # White space between tokens is free in JSON: a model that likes it would write nothing else.
                grammar = matcher.grammar_from_json_schema(constraint.text, {"whitespace_flexible": False})
            elif constraint.form == "regex":
                grammar = matcher.grammar_from_regex(constraint.text)
            else:
                grammar = matcher.grammar_from_lark(constraint.text)
            made = matcher(self._tokenizer, grammar, log_level=0)
            wrong = made.get_error() if made.is_error() else ""
        except Exception as error:  # noqa: BLE001 -- see above
            wrong = str(error) or type(error).__name__
        if wrong:
            raise InputError(f"cannot be followed: {wrong.strip()[:300]}", where=constraint.form)
        return Matcher(made, self._vocabulary)


class Matcher:
    """Follows one answer. Not safe for several threads at once."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary

    def allowed(self, logits: Array) -> Array:
        """Return float32 logits [vocabulary] with minus infinity for tokens that may not follow.

        Raises:
            InputError: the constraint became too complex to follow.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        bits = np.unpackbits(mask, bitorder="little")[: self._vocabulary]
        if self._matcher.is_error() or not bits.any():
            raise self._refusal()
        found = np.full_like(logits, -np.inf)
        at = np.flatnonzero(bits)
        found[at] = logits[at]
        return found

    def take(self, token: int) -> bool:
        """Go on by a token that :meth:`allowed` allows, and return whether the answer is complete.

        Raises:
            InputError: no token of the model's vocabulary can follow.
        """
        self._matcher.consume_token(token)
        if not self._matcher.is_stopped():
            return False
        if not self._matcher.is_accepting():
            raise self._refusal()
        return True

    def _refusal(self) -> InputError:
        reason = self._matcher.get_error() or "no token of the model's vocabulary can follow"
        return InputError(f"the constraint cannot be met: {reason[:300]}", where="constraint")

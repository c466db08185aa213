"""Multiple-choice questions of the user's, answered by log-likelihood: of the choices after a question, the model takes
the one whose tokens together are the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kedge.evaluation.decoders import texts
from kedge.evaluation.decoders.figures import log_softmax
from kedge_protocol.errors import DatasetError
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.spec import Array

WANTED = 200
"""Largest number of questions that are asked."""
_KEYS = "question", "choices", "answer"


@dataclass(frozen=True, kw_only=True)
class ChoiceFigures:
    """How many questions were answered rightly.

    Attributes:
        accuracy, reference: share of right answers of the compressed and of the float model.
        accuracy_error: standard error of ``accuracy`` over the questions.
        difference_error: standard error of ``accuracy - reference``: both answered the same questions.
        same: share of questions that both answered alike.
        questions: number of questions.
    """

    accuracy: float
    accuracy_error: float
    reference: float
    difference_error: float
    same: float
    questions: int

    @property
    def said(self) -> str:
        """Return the figures in words."""
        difference = f"{self.accuracy - self.reference:+.3f} ± {self.difference_error:.3f}"
        return (
            f"{self.questions} multiple-choice questions: {self.accuracy:.3f} ± {self.accuracy_error:.3f} right, the "
            f"float model {self.reference:.3f} ({difference}); {self.same:.3f} answered alike"
        )


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question as tokens.

    Attributes:
        rows: tokens of the question followed by each of its choices.
        lengths: number of each choice's own tokens, at the end of its row.
        answer: index of the right choice.
    """

    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    answer: int


def read(path: Path, tokenizer: Any, *, begin: int | None, longest: int) -> list[Question]:
    """Read questions from JSON lines, at most :data:`WANTED` of them, spread evenly::

        {"question": "The capital of France is", "choices": ["Paris", "Rome", "Oslo"], "answer": 0}

    A choice is what follows the question and a blank; ``answer`` is its index, or the choice itself.

    Args:
        begin: the token that begins each sequence, if there is one.
        longest: largest number of tokens of a question with a choice.

    Raises:
        DatasetError: there is no question, or a line is none, or too long.
    """
    numbered = texts.numbered_lines(path)
    if not numbered:
        raise DatasetError("holds no question", where=str(path), remedy=_remedy())
    asked = [_parsed(line, f"{path}:{number}") for number, line in numbered]  # all: a wrong line is told
    some = np.unique(np.linspace(0, len(asked) - 1, min(WANTED, len(asked))).round().astype(int))
    head = () if begin is None else (begin,)
    found = []
    for at in some:
        question, choices, answer = asked[at]
        pairs = [_tokens(tokenizer, head, question, choice) for choice in choices]
        if (most := max(len(row) for row, _ in pairs)) > longest:
            raise DatasetError(
                f"{most} tokens are more than the {longest} of the context",
                where=f"{path}:{numbered[at][0]}",
                remedy="Shorten the question, or give more with --context",
            )
        rows, lengths = zip(*pairs, strict=True)
        found.append(Question(rows=rows, lengths=lengths, answer=answer))
    return found


def _parsed(line: str, where: str) -> tuple[str, list[str], int]:
    value = texts.parsed(line, where, remedy=_remedy())
    question, choices, answer = (value.get(key) for key in _KEYS) if isinstance(value, dict) else (None, None, None)
    if not isinstance(question, str) or not question.strip():
        raise DatasetError("has no question", where=where, remedy=_remedy())
    if not isinstance(choices, list) or not all(isinstance(one, str) and one.strip() for one in choices):
        raise DatasetError("has no list of choices", where=where, remedy=_remedy())
    if len(set(choices)) < max(len(choices), 2):
        raise DatasetError("needs two choices or more, all different", where=where, remedy=_remedy())
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise DatasetError(f"{answer!r} is none of its {len(choices)} choices", where=where, remedy=_remedy())
    return question.rstrip(), choices, answer


def _remedy() -> str:
    return 'Write a line for each, as {"question": "2 + 2 =", "choices": ["4", "5"], "answer": 0}'


def _tokens(tokenizer: Any, head: tuple[int, ...], question: str, choice: str) -> tuple[tuple[int, ...], int]:
    """Return the tokens of a question with a choice, and how many of them are the choice's."""
    before = tokenizer.encode(question, add_special_tokens=False).ids
    whole = tokenizer.encode(f"{question} {choice.strip()}", add_special_tokens=False).ids
    # Where a token holds the end of one and the beginning of the other, it counts as the choice's.
    # The first token of all has nothing before it that could make it likely.
    kept = len(whole) - max(_shared(before, whole), 0 if head else 1)
    return (*head, *whole), kept


def _shared(tokens: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    shortest = min(len(tokens), len(others))
    return next((at for at in range(shortest) if tokens[at] != others[at]), shortest)


def asked(session: DecoderSession, questions: Sequence[Question], heard: Callable[[int, int], None]) -> list[int]:
    """Return the choice that a session takes of each question; uses the first slot."""
    taken: list[int] = []
    before: tuple[int, ...] = ()
    session.truncate(0, 0)
    for number, question in enumerate(questions):
        heard(number, len(questions))
        scores = []
        for row, length in zip(question.rows, question.lengths, strict=True):
            # What a row shares with the one before is not read anew, but for the token before the choice.
            shared = min(_shared(row, before), len(row) - length - 1)
            if not session.can_keep(len(before), shared):
                shared = 0
            session.truncate(0, shared)
            scores.append(_likelihood(session.extend(0, list(row[shared:-1]), keep=length), row[-length:]))
            before = row[:-1]
        taken.append(int(np.argmax(scores)))
    session.truncate(0, 0)
    return taken


def asked_in_float(
    questions: Sequence[Question], before_head: Callable[[list[list[int]]], list[Array]], head: Array
) -> list[int]:
    """Return the choice that the float model takes of each question.

    Args:
        before_head: returns the head's inputs for sequences, float32 [positions, channels] each.
        head: float32 [vocabulary, channels].
    """
    rows = [list(row[:-1]) for question in questions for row in question.rows]
    hidden = iter(before_head(rows))
    return [
        int(
            np.argmax(
                [
                    _likelihood(next(hidden)[-length:] @ head.T, row[-length:])
                    for row, length in zip(question.rows, question.lengths, strict=True)
                ]
            )
        )
        for question in questions
    ]


def _likelihood(logits: Array, tokens: Sequence[int]) -> float:
    """Return the log-likelihood of tokens by the logits of the positions before them."""
    return float(log_softmax(logits)[np.arange(len(tokens)), list(tokens)].sum())


def figures(questions: Sequence[Question], taken: Sequence[int], reference: Sequence[int]) -> ChoiceFigures:
    """Return the figures of the choices that the compressed and the float model took."""
    right = np.array([one.answer for one in questions])
    own, true = np.asarray(taken) == right, np.asarray(reference) == right
    count = len(questions)
    return ChoiceFigures(
        accuracy=float(own.mean()),
        accuracy_error=float(own.std() / np.sqrt(max(1, count - 1))),
        reference=float(true.mean()),
        difference_error=float((own.astype(float) - true).std() / np.sqrt(max(1, count - 1))),
        same=float((np.asarray(taken) == np.asarray(reference)).mean()),
        questions=count,
    )

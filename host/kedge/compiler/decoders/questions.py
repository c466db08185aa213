"""The multiple-choice questions of a compilation: asked of the float model once, and of what is packed."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

from kedge.compiler.decoders.float_model import FloatModel
from kedge.compiler.decoders.worker_messages import DecoderRequest
from kedge.compiler.decoders.worker_parts import opened
from kedge.evaluation.decoders import choices
from kedge.evaluation.decoders.choices import ChoiceFigures
from kedge_targets.decoder.contract import LoweredDecoder
from kedge_targets.worker import Progress


class Questions:
    """The questions that a request names; without any, nothing is asked.

    Raises:
        DatasetError: a line is no question.
    """

    def __init__(self, request: DecoderRequest, tokenizer: Any, *, begin: int | None, context: int) -> None:
        path = request.choices
        self._asked = [] if path is None else choices.read(Path(path), tokenizer, begin=begin, longest=context)
        self._reference: list[int] = []

    def ask_float(self, model: FloatModel) -> None:
        """Ask the float model."""
        if self._asked:
            self._reference = choices.asked_in_float(
                self._asked, lambda rows: model.before_head(rows, "questions in float"), model.head
            )

    def figures(self, request: DecoderRequest, lowered: LoweredDecoder, progress: Progress) -> ChoiceFigures | None:
        """Ask what is packed for the request's backend."""
        if not self._asked:
            return None
        longest = max(len(row) for question in self._asked for row in question.rows)
        with closing(opened(request, lowered, context=longest)) as session:
            taken = choices.asked(session, self._asked, lambda done, total: progress("questions", done, total))
        return choices.figures(self._asked, taken, self._reference)

"""Texts that a model reads or hears: error rates of characters and words, after CTC decoding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.evaluation.kinds import ClassifiedOutput
from kedge.evaluation.metrics.contract import Direction, Metric
from kedge_protocol.errors import DatasetError, MissingDependencyError
from kedge_protocol.packages import pip_install

Array = npt.NDArray[Any]

_RANK = 3


class _ErrorRate(Metric):
    """Edits (insertions, deletions, substitutions) that turn the answer into the label, over the label's length; jiwer
    counts them.

    The output is a text for each sample, or CTC scores NxTxC (the best class of each step; repetitions and blanks,
    which are class 0, go; Graves et al., 2006). The labels are texts, or for CTC scores rows of class numbers, padded
    with 0.
    """

    direction = Direction.LOWER
    needs_labels = True
    span = None
    words: ClassVar[bool]

    @classmethod
    def suits(cls, seen: ClassifiedOutput, reference: Array, labels: Any | None) -> bool:
        """Texts for texts, or scores of steps for rows of class numbers."""
        found = np.asarray(labels)
        if reference.dtype.kind in "OUS":
            return found.dtype.kind in "OUS"
        return reference.ndim == _RANK and found.ndim == 2 and found.dtype.kind in "iu" and bool((found >= 0).all())

    def check(self, reference: Mapping[str, Array], labels: Any | None, *, where: str) -> None:
        """Texts for texts, class numbers for scores."""
        _jiwer()
        array, wanted = reference[self.output or ""], np.asarray(labels)
        textual = array.dtype.kind in "OUS"
        fit = wanted.dtype.kind in "OUS" if textual else wanted.ndim == 2 and wanted.dtype.kind in "iu"
        if not fit:
            want = "a text for each sample" if textual else "rows of class numbers, padded with 0"
            raise DatasetError(f"label has dtype {wanted.dtype}, {want} was expected", where=where)
        if self.words and not textual:
            raise DatasetError("class numbers have no words", where=where, remedy="Take --metric cer")

    def per_sample(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array:
        """N x 2: edits, and the label's length."""
        jiwer = _jiwer()
        process = jiwer.process_words if self.words else jiwer.process_characters
        answers, wanted = texts(outputs[self.output or ""]), texts(np.asarray(labels))
        rows = []
        for answer, label in zip(answers, wanted, strict=True):
            if not label.strip():
                rows.append((len(answer.split()) if self.words else len(answer), 0))
                continue
            found = process(label, answer)
            length = found.hits + found.substitutions + found.deletions
            rows.append((found.substitutions + found.deletions + found.insertions, length))
        return np.asarray(rows, dtype=np.float64)

    def aggregate(self, rows: Array) -> float:
        """All edits over all lengths."""
        edits, length = rows.sum(axis=0)
        return float(edits / max(length, 1.0))


class CharacterErrorRate(_ErrorRate):
    """Edits of characters over the labels' characters."""

    name = "cer"
    words = False


class WordErrorRate(_ErrorRate):
    """Edits of words over the labels' words."""

    name = "wer"
    words = True


def texts(array: Array) -> list[str]:
    """Texts of an output or of labels: as they are, from CTC scores NxTxC, or from rows of class numbers (0 pads)."""
    if array.dtype.kind in "OUS":
        return [one.decode() if isinstance(one, bytes) else str(one) for one in array.reshape(len(array))]
    if array.ndim == _RANK:
        return [_spelled(row[np.insert(row[1:] != row[:-1], 0, True)]) for row in array.argmax(axis=2)]
    return [_spelled(row) for row in array.astype(np.int64)]


def _spelled(numbers: Array) -> str:
    """Class numbers as characters of a private area, without blanks: jiwer compares texts."""
    return "".join(chr(0xF0000 + int(one)) for one in numbers if one > 0)


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise MissingDependencyError("error rates of texts need jiwer", remedy=pip_install("metrics")) from error
    return jiwer


METRICS = (CharacterErrorRate, WordErrorRate)

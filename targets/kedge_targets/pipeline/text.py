"""Turns texts into tokens with the ``tokenizers`` library (WordPiece, BPE, Unigram), padded to the lengths that a model
takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Text
from kedge_protocol.errors import BundleError, InputError, MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install

Array = npt.NDArray[Any]

MAX_CHARACTERS = 1_000_000
"""A longer text is rejected."""
USUAL = {
    "ids": ("input_ids", "ids", "tokens", "input"),
    "mask": ("attention_mask", "mask", "input_mask"),
    "types": ("token_type_ids", "segment_ids", "type_ids"),
}
"""The usual names of a model's inputs."""


class Encoding(Protocol):
    """The library's encoding of one text."""

    @property
    def ids(self) -> list[int]:
        """The numbers of the tokens."""

    @property
    def type_ids(self) -> list[int]:
        """For each token, which of two texts it belongs to."""


class Tokenizer:
    """A ``tokenizer.json``, ready to encode.

    Args:
        content: the file's content.
        how: the pipeline's section.
        where: the file's name in messages.

    Raises:
        MissingDependencyError: ``tokenizers`` is not installed.
        BundleError: the file is not a tokenizer.
    """

    def __init__(self, content: str, how: Text, *, where: str = "") -> None:
        try:
            from tokenizers import Tokenizer as Library
        except ImportError as error:
            raise MissingDependencyError(
                "a text becomes tokens by the package tokenizers, which is not installed",
                remedy=f"Install it: {pip_install('text', of=AGENT)}",
            ) from error
        try:
            self._library = Library.from_str(content)
        except Exception as error:
            # The library raises bare exceptions.
            raise BundleError(
                f"is no tokenizer: {error}", where=where or None, remedy="Give a tokenizer.json of Hugging Face"
            ) from error
        self._library.no_padding()
        self._library.enable_truncation(how.max_length)

    def __call__(self, text: str) -> Encoding:
        """Return the tokens of one text, including special tokens.

        Raises:
            InputError: the item is not a text, or is longer than :data:`MAX_CHARACTERS`.
        """
        if not isinstance(text, str):
            raise InputError(
                f"{type(text).__name__} is no text", remedy="Give a string; for the model's tensors call Model.raw"
            )
        if len(text) > MAX_CHARACTERS:
            raise InputError(f"a text of {len(text)} characters is over the limit of {MAX_CHARACTERS}")
        encoding: Encoding = self._library.encode(text)
        return encoding


def bucket(length: int, how: Text, fixed: int | None) -> int:
    """Return the length to which a text of ``length`` tokens is padded.

    Args:
        fixed: the model's own length, if it has one.
    """
    if fixed is not None:
        return fixed
    return next((one for one in how.buckets if one >= length), how.max_length)


def filled(encodings: Sequence[Encoding], length: int, how: Text) -> dict[str, Array]:
    """Return the tensors of some texts, int64 texts x length: ``ids``, ``mask`` (1 for all but padding) and
    ``types``."""
    shape = (len(encodings), length)
    made = {"ids": np.full(shape, how.pad, np.int64), "mask": np.zeros(shape, np.int64), "types": np.zeros(shape, int)}
    for row, one in enumerate(encodings):
        count = min(length, len(one.ids))
        made["ids"][row, :count] = one.ids[:count]
        made["types"][row, :count] = one.type_ids[:count]
        made["mask"][row, :count] = 1
    made["types"] = made["types"].astype(np.int64)
    return made

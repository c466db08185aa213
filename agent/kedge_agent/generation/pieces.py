"""Decodes tokens to pieces of text that may be shown: never a part of a character, never a part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextPieces:
    """Decodes one answer piece by piece.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library.
        stop: strings that end the answer; the shown text never contains one, nor the beginning of one that may still be
            completed.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, token: int) -> str:
        """Add a token and return the text that may be shown now, which is often empty."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._tokenizer, token) or ""
        found = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        return self._release()

    def end(self) -> str:
        """Return the rest of the text when no further token comes."""
        shown, self._held = self._held, ""
        return "" if self.stopped else shown

    def _release(self) -> str:
        """Return the held text except an end that may be the beginning of a stop string."""
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        cut = len(self._held) - longest
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

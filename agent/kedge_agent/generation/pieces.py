"""Decodes tokens to pieces of text that may be shown: never a part of a character, never a part of a stop string."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any


class TextPieces:
    """Decodes one answer piece by piece.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library.
        stop: strings that end the answer; the shown text never contains one, nor the beginning of one that may still be
            completed.
        after: the token before the first one: a tokenizer that marks the beginnings of words leaves out the space of a
            text's first word, and of no other.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), *, after: int | None = None) -> None:
        from tokenizers.decoders import DecodeStream

        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        # The last bytes of a character are no text by themselves, and would be shown as one that is damaged.
        if after is not None and "\N{REPLACEMENT CHARACTER}" not in tokenizer.decode([after]):
            self._stream.step(tokenizer, after)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        """Whether a stop string was found."""

    def add(self, token: int) -> str:
        """Add a token and return the text that may be shown now, which is often empty."""
        if self.stopped:
            return ""
        piece: str = self._stream.step(self._tokenizer, token) or ""
        if not self._stop:
            return piece
        self._held += piece
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


class TokenBytes:
    """What each token stands for by itself, which may be a part of a character.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        decoder = tokenizer.decoder
        self._byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()

    def __call__(self, token: int) -> bytes:
        """Return the bytes of a token; none for one outside the vocabulary."""
        piece: str = self._tokenizer.id_to_token(token) or ""
        if self._byte_level and all(letter in _byte_letters() for letter in piece):
            return bytes(_byte_letters()[letter] for letter in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


_BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token of SentencePiece's byte fallback."""


@functools.cache
def _byte_letters() -> dict[str, int]:
    """Return the letter of each byte in a byte-level vocabulary (GPT-2, ``bytes_to_unicode``): its own where it is
    visible, for the others those from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + at): byte for at, byte in enumerate(hidden)}

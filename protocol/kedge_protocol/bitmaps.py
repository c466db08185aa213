"""Bitmaps of finished blocks, as they travel in requests."""

from __future__ import annotations

import base64

from kedge_protocol.errors import MessageError


def encode_bitmap(finished: bytes | bytearray) -> str:
    """Return a bitmap in base64, least significant bit first within each byte; bit i says that block i is finished."""
    return base64.b64encode(bytes(finished).rstrip(b"\0")).decode("ascii")


def decode_bitmap(text: str, *, where: str) -> bytes:
    """Return the bitmap's bytes; bits beyond its end are unset.

    Raises:
        MessageError: the text is not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise MessageError(f"the bitmap is not base64: {error}", where=where) from error


def bit_is_set(bitmap: bytes | bytearray, index: int) -> bool:
    """Return whether block ``index`` is finished."""
    byte = index >> 3
    return byte < len(bitmap) and bool(bitmap[byte] >> (index & 7) & 1)

"""JSON documents and their typed views.

Bytes are identity: a received document is kept as received and is never serialized again. Parsing makes a
*view*: a frozen dataclass with the fields that this version knows; unknown fields stay in the bytes. Types are checked
strictly (no ``"5"`` for ``5``). Files written by hand (TOML) are read with ``strict=True``: there an unknown key is
an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from kedge_protocol.errors import MessageError
from kedge_protocol.views import named, structure, unstructure

__all__ = ["MAX_DOCUMENT_BYTES", "decode", "encode", "loads", "named", "sayable", "structure", "unstructure"]

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
"""Largest size of a JSON document, in bytes."""


def encode(value: Any) -> bytes:
    """Serialize a new document as canonical JSON (sorted keys, no white space, UTF-8), so that equal values have equal
    digests. Received documents are never serialized again."""
    plain = unstructure(value)
    return _ENCODER.encode(plain).encode()


def sayable(text: str) -> str:
    """Return ``text`` with escapes for characters that UTF-8 cannot encode: lone surrogates, as in some file names."""
    return text.encode("utf-8", "backslashreplace").decode()


def loads(raw: bytes, *, where: str, finite: bool = True) -> Any:
    """Parse JSON bytes.

    Args:
        finite: reject NaN and Infinity, which a worker may have measured.

    Raises:
        MessageError: it is not JSON by RFC 8259 (UTF-8, no NaN, no Infinity), contains a number beyond a double's
            range or a lone surrogate, or is larger than :data:`MAX_DOCUMENT_BYTES`: anything that :func:`encode` could
            not write.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise MessageError(f"a document of {len(raw)} bytes is over the limit", where=where)
    try:
        text = raw.decode()
        value = _FINITE.decode(text) if finite else json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise MessageError("its text is no Unicode", where=where) from error
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}", where=where) from error
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:80]} is no finite number")
    return number


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_FINITE = json.JSONDecoder(parse_constant=_finite, parse_float=_finite)


def decode(raw: bytes, cls: type[T], *, where: str) -> T:
    """Parse received JSON bytes into a typed view.

    Raises:
        MessageError: it is not JSON, or a field is missing or of the wrong type.
    """
    data = loads(raw, where=where)
    if not isinstance(data, Mapping):
        raise MessageError(f"an object was expected, not a {type(data).__name__}", where=where)
    return structure(data, cls, where=where)

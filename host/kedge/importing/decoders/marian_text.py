"""Makes a ``tokenizer.json`` of a Marian folder's ``source.spm`` and ``vocab.json``.

Marian cuts a text by the pieces of ``source.spm`` (SentencePiece, unigram; Kudo, 2018) and numbers them by
``vocab.json``, which holds the target's pieces too. So the vocabulary of the result is that of ``vocab.json``, with the
source's scores; a piece that the source does not have scores so low that only a character without any other piece
becomes one. An ``.spm`` file is a protocol buffer (``sentencepiece_model.proto``); four of its fields are read.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kedge.importing.decoders.config import read_json
from kedge_protocol.errors import ModelError

_LOWEST = -1e5
_UNIGRAM = 1
_MARK = "\u2581"
_AGAIN = "Fetch the file again"


def tokenizer(folder: Path) -> bytes | None:
    """Return the content of a ``tokenizer.json``; None if the folder has not Marian's files.

    Raises:
        ModelError: a file is damaged or of another kind.
    """
    source, vocabulary = folder / "source.spm", folder / "vocab.json"
    if not source.is_file() or not vocabulary.is_file():
        return None
    if (folder / "target_vocab.json").is_file():
        raise ModelError("has a vocabulary of its own for the target, which is not read", where=str(folder))
    ids = _ids(vocabulary)
    scores, charsmap = _pieces(source)
    names = {at: name for name, at in ids.items()}
    pieces = [names.get(at, f"<unused{at}>") for at in range(max(names) + 1)]
    special = [name for name in pieces if name in ("<unk>", "</s>", "<pad>") or _is_language(name)]
    whole = {
        "version": "1.0",
        "added_tokens": [_added(name, ids[name]) for name in special],
        "normalizer": _normalizer(charsmap),
        "pre_tokenizer": _METASPACE,
        "decoder": _METASPACE,
        "model": {
            "type": "Unigram",
            "unk_id": ids["<unk>"],
            "vocab": [[name, scores.get(name, _LOWEST)] for name in pieces],
            "byte_fallback": False,
        },
    }
    return json.dumps(whole, ensure_ascii=False).encode()


_METASPACE = {"type": "Metaspace", "replacement": _MARK, "prepend_scheme": "always", "split": True}


def _is_language(name: str) -> bool:
    return name.startswith(">>") and name.endswith("<<")


def _added(name: str, at: int) -> dict[str, Any]:
    # A text follows its language's token after a space.
    return {
        "id": at,
        "content": name,
        "special": True,
        "normalized": False,
        "single_word": False,
        "lstrip": False,
        "rstrip": _is_language(name),
    }


def _normalizer(charsmap: bytes) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode("ascii")})
    steps.append({"type": "Strip", "strip_left": True, "strip_right": True})
    steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    return {"type": "Sequence", "normalizers": steps}


def _ids(path: Path) -> dict[str, int]:
    found = read_json(path)
    if "<unk>" not in found or not all(isinstance(at, int) and 0 <= at < 1 << 24 for at in found.values()):
        raise ModelError("is no vocabulary with <unk>", where=str(path), remedy=_AGAIN)
    return {str(name): int(at) for name, at in found.items()}


def _pieces(path: Path) -> tuple[dict[str, float], bytes]:
    """Return the score of each piece, and the table of the normalizer."""
    scores: dict[str, float] = {}
    charsmap = b""
    try:
        for field, value in _fields(path.read_bytes()):
            if field == 1:
                piece = dict(_fields(value))
                scores[piece[1].decode()] = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            elif field == 2:
                kind = dict(_fields(value)).get(3, _UNIGRAM)
                if kind != _UNIGRAM:
                    raise ModelError("is no unigram model", where=str(path), remedy="Give a tokenizer.json")
            elif field == 3:
                charsmap = dict(_fields(value)).get(2, b"")
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ModelError(f"is no SentencePiece file: {error}", where=str(path), remedy=_AGAIN) from error
    if not scores:
        raise ModelError("holds no pieces", where=str(path), remedy=_AGAIN)
    return scores, charsmap


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protocol buffer: an int for a varint, bytes for the others."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            value, at = _varint(raw, at)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, at = _varint(raw, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(raw):
            raise ValueError("it is cut short")
        yield tag >> 3, raw[at : at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 127) << shift
        at += 1
        if raw[at - 1] < 128:
            return value, at
        shift += 7

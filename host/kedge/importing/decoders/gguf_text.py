"""Reads the text side of a GGUF file: its vocabulary as ``tokenizer.json``, its template, its end tokens."""

from __future__ import annotations

import json
from typing import Any

from kedge.importing.decoders import turns
from kedge.importing.decoders.text import TextFiles
from kedge_protocol.errors import ModelError

_CONTROL, _OWN = 3, 4
"""Types of tokens that are never part of others (llama.h, ``llama_token_type``): control, and those of the user."""
# Splits that llama.cpp names in tokenizer.ggml.pre (llama-vocab.cpp there).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {"gpt-2": _GPT2, "default": _GPT2, "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "qwen2": _QWEN2}
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell")
_OF_LLAMA3 = ("llama-bpe", "llama3")
"""What llama-vocab.cpp knows of these splits, and Llama 3's files do not say: texts begin with a token, and a word that
is a token is not merged of others."""


def text_of(fields: dict[str, Any], where: str) -> TextFiles:
    """Read the text side.

    Raises:
        ModelError: there is no vocabulary, or its kind is unknown.
    """
    tokens = fields.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError("holds no vocabulary", where=where, remedy="Give a GGUF with its tokenizer")
    kind = fields.get("tokenizer.ggml.model")
    types = fields.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2":
        made = _byte_level(fields, tokens, where)
    elif kind == "llama":
        made = _sentence_pieces(fields, tokens)
    else:
        raise ModelError(
            f"tokenizer.ggml.model {kind!r} is not read", where=where, remedy="Give the Hugging Face folder instead"
        )
    made["added_tokens"] = [
        {
            "id": at,
            "content": token,
            "special": one == _CONTROL,
            "normalized": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
        }
        for at, (token, one) in enumerate(zip(tokens, types, strict=False))
        if one in (_CONTROL, _OWN)
    ]
    ends = {
        fields[key]
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if fields.get(key) is not None
    }
    special = {
        name: tokens[fields[key]]
        for name, key in (("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id"))
        if fields.get(key) is not None and fields[key] < len(tokens)
    }
    template = fields.get("tokenizer.chat_template")
    if template is not None:
        ends |= turns.ends(template, special, {one["content"]: one["id"] for one in made["added_tokens"]}, where=where)
    return TextFiles(
        tokenizer=json.dumps(made, ensure_ascii=False).encode(),
        template=template,
        begin_token=_begin_token(fields),
        end_tokens=tuple(sorted(int(one) for one in ends)),
        special=special,
    )


def _begin_token(fields: dict[str, Any]) -> int | None:
    begin = fields.get("tokenizer.ggml.bos_token_id")
    usual = fields.get("tokenizer.ggml.model") == "llama" or fields.get("tokenizer.ggml.pre") in _OF_LLAMA3
    return int(begin) if begin is not None and fields.get("tokenizer.ggml.add_bos_token", usual) else None


def _byte_level(fields: dict[str, Any], tokens: list[str], where: str) -> dict[str, Any]:
    pre = fields.get("tokenizer.ggml.pre", "default")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pre in _DIGITS:
        splits = [{"type": "Digits", "individual_digits": True}, level]
    elif pre in _SPLITS:
        pattern = {"type": "Split", "pattern": {"Regex": _SPLITS[pre]}, "behavior": "Isolated", "invert": False}
        splits = [pattern, {**level, "use_regex": False}]
    else:
        raise ModelError(
            f"tokenizer.ggml.pre {pre!r} is not known", where=where, remedy="Give the Hugging Face folder instead"
        )
    return {
        "version": "1.0",
        # As Qwen2's own tokenizer has it; llama.cpp leaves decomposed letters as they are.
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splits},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: at for at, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in fields.get("tokenizer.ggml.merges") or ()],
            "ignore_merges": pre in _OF_LLAMA3,
        },
    }


def _sentence_pieces(fields: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """Convert SentencePiece's BPE, whose scores determine the order of merges."""
    ranks = {token: at for at, token in enumerate(tokens)}
    scores = fields.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    merges = []
    for token, score in zip(tokens, scores, strict=False):
        for cut in range(1, len(token)):
            if token[:cut] in ranks and token[cut:] in ranks:
                merges.append((-score, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:]))
    unknown = fields.get("tokenizer.ggml.unknown_token_id", 0)
    prefix = [{"type": "Prepend", "prepend": "▁"}] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
    return {
        "version": "1.0",
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*prefix, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": ranks,
            "merges": [[left, right] for *_, left, right in sorted(merges)],
            "unk_token": tokens[unknown] if unknown < len(tokens) else None,
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }

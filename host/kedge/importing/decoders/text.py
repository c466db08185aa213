"""The text side of a decoder: tokenizer, chat template, the tokens that end an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.importing.decoders import marian_text, turns
from kedge.importing.decoders.config import read_json
from kedge_protocol.bundle.generation import AnswerRules, Source
from kedge_protocol.errors import ModelError

_AGAIN = "Fetch the file again"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True, kw_only=True)
class TextFiles:
    """The text side of a decoder.

    Attributes:
        tokenizer: content of ``tokenizer.json``.
        template: the chat template in Jinja; None if there is none.
        begin_token: token put before a plain text; None if there is none.
        end_tokens: tokens that end an answer.
        special: texts of ``bos_token``, ``eos_token``, … for the template.
        source: what the encoder of an encoder-decoder reads, without the bytes that a backend takes for it.
        rules: what holds for every answer.
        warnings: what the folder asks for and is not done.
    """

    tokenizer: bytes
    template: str | None
    begin_token: int | None
    end_tokens: tuple[int, ...]
    special: dict[str, str] = field(default_factory=dict)
    source: Source | None = None
    rules: AnswerRules = field(default_factory=AnswerRules)
    warnings: tuple[str, ...] = ()


def of_folder(folder: Path, config: Mapping[str, Any]) -> TextFiles:
    """Read the text side of a folder.

    Raises:
        ModelError: there is no tokenizer.json, or a file is damaged.
    """
    path = folder / "tokenizer.json"
    made = None if path.is_file() else marian_text.tokenizer(folder)
    if made is None and not path.is_file():
        raise ModelError(
            "holds no tokenizer.json",
            where=str(folder),
            remedy="Save the fast tokenizer beside the weights (AutoTokenizer.from_pretrained(…).save_pretrained(…))",
        )
    tokenizer = path.read_bytes() if made is None else made
    settings = optional(folder / "tokenizer_config.json")
    generation = optional(folder / "generation_config.json")
    special = {name: text for name in _SPECIAL if (text := _token_text(settings.get(name))) is not None}
    template = _template(folder, settings)
    ids = token_ids(tokenizer, where=str(path))
    ends = {*numbers(config.get("eos_token_id")), *numbers(generation.get("eos_token_id"))}
    if special.get("eos_token") in ids:
        ends.add(ids[special["eos_token"]])
    if template is not None:
        ends |= turns.ends(template, special, ids, where=str(folder))
    return TextFiles(
        tokenizer=tokenizer,
        template=template,
        begin_token=_begin_token(tokenizer, settings, config, where=str(path)),
        end_tokens=tuple(sorted(ends)),
        special=special,
    )


def _begin_token(tokenizer: bytes, settings: Mapping[str, Any], config: Mapping[str, Any], *, where: str) -> int | None:
    """Return the token that a folder's tokenizer puts before a text.

    As in transformers, the tokenizer's post-processor decides; where there is none, ``add_bos_token``, which its
    versions before 5 followed. A ``bos_token_id`` alone puts nothing: Qwen2, SmolLM2 and GPT-2 have one that no text
    begins with.
    """
    processor = json.loads(tokenizer).get("post_processor")
    if processor is None:
        begin = numbers(config.get("bos_token_id"))
        return begin[0] if begin and settings.get("add_bos_token") is True else None
    try:
        for one in (processor, *(processor.get("processors") or ())):
            if one["type"] == "TemplateProcessing" and "SpecialToken" in one["single"][0]:
                name = one["single"][0]["SpecialToken"]["id"]
                return int(one["special_tokens"][name]["ids"][0])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"is no tokenizer: its post-processor lacks {error}", where=where, remedy=_AGAIN) from error
    return None


def token_ids(tokenizer: bytes, *, where: str) -> dict[str, int]:
    """Return the tokenizer's added tokens: text → id.

    Raises:
        ModelError: the bytes are not a tokenizer.json.
    """
    try:
        found = json.loads(tokenizer)
        if "model" not in found:
            raise ValueError("it has no 'model'")
        return {str(token["content"]): int(token["id"]) for token in found.get("added_tokens") or ()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"is no tokenizer: {error}", where=where, remedy=_AGAIN) from error


def _template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    own = folder / "chat_template.jinja"
    if own.is_file():
        try:
            return own.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"cannot be read as UTF-8: {error}", where=str(own), remedy=_AGAIN) from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        # Several by name: the one for plain chats.
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, Mapping)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _token_text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def optional(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; an empty one if there is no file.

    Raises:
        ModelError: the file is no JSON object.
    """
    return read_json(path) if path.is_file() else {}


def numbers(value: Any) -> list[int]:
    """Return the whole numbers of a value that is one or a list of them."""
    several = value if isinstance(value, list) else [value]
    return [one for one in several if isinstance(one, int) and not isinstance(one, bool)]

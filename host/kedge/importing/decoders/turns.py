"""Tries a chat template when a model is imported: one that renders no conversation is refused before the long work, and
the token that it puts after an answer ends an answer, whatever the configuration names."""

from __future__ import annotations

from collections.abc import Mapping

from kedge_protocol.errors import BundleError, InputError, ModelError
from kedge_targets.decoder.chat_template import ChatTemplate

_ANSWER = "Fine"
_USER = {"role": "user", "content": "Hello"}


def ends(template: str, special: Mapping[str, str], ids: Mapping[str, int], *, where: str) -> set[int]:
    """Return the token that a template puts after an answer; nothing if it puts none.

    Args:
        special: the template's variables for special tokens.
        ids: text → id of tokens that are never part of others.

    Raises:
        ModelError: the template is no Jinja, raises at a plain message, or does not end.
        MissingDependencyError: jinja2 is not installed.
    """
    try:
        tried = ChatTemplate(template, special)
        tried.render([_USER])
    except (BundleError, InputError) as error:
        raise ModelError(
            f"the chat template cannot be used: {error.what}",
            where=where,
            remedy="Correct it, or take it away: then the model goes on with texts",
        ) from error
    try:
        rendered = tried.render([_USER, {"role": "assistant", "content": _ANSWER}], prompt=False)
    except InputError:
        return set()  # it renders no answers, so it says nothing about their end
    after = rendered.rpartition(_ANSWER)[2].lstrip()
    found = [text for text in ids if text and after.startswith(text)]
    return {ids[max(found, key=len)]} if found else set()

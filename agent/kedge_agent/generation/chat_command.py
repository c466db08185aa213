"""``kedge-agent chat``: a conversation with a language model in a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from kedge_agent.model import Model
from kedge_protocol.errors import InputError


def talk(model: Model, lines: Iterable[str], write: Callable[[str], object], options: dict[str, Any]) -> None:
    """Answer line after line; a model without a chat template continues each line.

    Args:
        lines: the user's messages; empty lines are skipped.
        write: shows a piece of text.
        options: options of :meth:`kedge_agent.Model.generate`.
    """
    spec = model.config.generation
    messages: list[dict[str, str]] = []
    for line in lines:
        said = line.strip()
        if not said:
            continue
        messages.append({"role": "user", "content": said})
        prompt: Any = messages if spec is not None and spec.template is not None else said
        try:
            answer = model.generate(prompt, stream=True, **options)
        except InputError as error:
            messages.pop()
            write(f"{error}\n")
            continue
        for piece in answer:
            write(piece)
        found = answer.finish()
        messages.append({"role": "assistant", "content": found.text})
        speed = len(found.tokens) / max(found.seconds - found.first_token_seconds, 1e-9)
        write(f"\n[{len(found.tokens)} tokens, {speed:.1f} a second, {found.reason}]\n")

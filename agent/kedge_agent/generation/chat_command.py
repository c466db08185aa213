"""``kedge-agent chat``: a conversation with a language model in a terminal, or line by line through a pipe."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_agent.model import Model
from kedge_agent.opening import open_model
from kedge_agent.slots import default_state, model_names
from kedge_protocol.errors import InputError

if TYPE_CHECKING:
    from kedge_agent.generation.generator import AnswerStream

NEW = "/new"
"""The line that begins a new conversation."""


@contextlib.contextmanager
def opened(source: str, target: str | None, state: Path | None, backend: str | None = None) -> Iterator[Model]:
    """Open the language model that a source names: a release folder (its only bundle if no target is given), a
    reference of a registry, or an installed model.

    Args:
        backend: see :class:`kedge_agent.Model`.

    Raises:
        InputError: there is no such model, or it writes no text.
        KedgeError: see :func:`kedge_agent.opening.open_model` and :func:`kedge_agent.serving.standalone.serve`.
    """
    with contextlib.ExitStack() as stack:
        if (Path(source) / "oci-layout").is_file() or source in model_names(state or default_state()):
            model = open_model(source, target=target, backend=backend, state=state)
        else:
            from kedge_agent.serving.standalone import install

            pulled = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kedge-chat-")))
            found = install(source, pulled, target=target, state=state or default_state(), backend=backend)
            found.settle(None)
            model = Model(found.folder.name, state=pulled)
        stack.enter_context(model)
        spec = model.config.generation
        if spec is None or (spec.source is not None and spec.source.speech is not None):
            raise InputError("takes no texts to answer", where=model.name, remedy="Call it with kedge-agent infer")
        yield model


def lines(model: Model, note: Callable[[str], object]) -> Iterable[str]:
    """Return the user's messages: from a terminal with a prompt and a line to edit, otherwise as they come.

    Args:
        note: shows a line that is not part of the conversation.
    """
    if not sys.stdin.isatty():
        return sys.stdin
    note(f"{model.name} {model.version}. {NEW} begins a new conversation, Ctrl-C stops an answer, Ctrl-D ends.")
    return _typed()


def _typed() -> Iterator[str]:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 -- input() edits its line with it
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stdout.write("\n")
            return
        except KeyboardInterrupt:  # meant for an answer that had just ended, or for the line
            sys.stdout.write("\n")


def talk(
    model: Model,
    said: Iterable[str],
    write: Callable[[str], object],
    note: Callable[[str], object],
    options: dict[str, Any],
    *,
    system: str | None = None,
) -> None:
    """Answer line after line; a model without a chat template continues each line.

    Args:
        said: the user's messages; empty lines are skipped, :data:`NEW` forgets what was said.
        write: shows a piece of an answer.
        note: shows a line about an answer.
        options: options of :meth:`kedge_agent.Model.generate`.
        system: the message that each conversation begins with.
    """
    spec = model.config.generation
    chats = spec is not None and spec.template is not None
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    for line in map(str.strip, said):
        if line == NEW:
            messages = list(first)
        if not line or line == NEW:
            continue
        asked = [*messages, {"role": "user", "content": line}]
        try:
            text = _answered(model.generate(asked if chats else line, stream=True, **options), write, note)
        except InputError as error:
            again = f" {NEW} begins a new conversation." if messages != first else ""
            note(f"{error}{again}")
        except KeyboardInterrupt:  # before the first token, or just as the answer ended
            note("[cancelled]")
        else:
            messages = [*asked, {"role": "assistant", "content": text}]


def _answered(answer: AnswerStream, write: Callable[[str], object], note: Callable[[str], object]) -> str:
    """Show an answer as it is written, Ctrl-C ends it; return what was written."""
    try:
        for piece in answer:
            write(piece)
    except KeyboardInterrupt:
        answer.close()
    found = answer.finish()
    speed = (len(found.tokens) - 1) / max(found.seconds - found.first_token_seconds, 1e-9)
    write("\n")
    note(f"[{len(found.tokens)} tokens, {speed:.1f} a second, {found.reason}]")
    return found.text

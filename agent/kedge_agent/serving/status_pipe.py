"""What the serving child tells the agent, over a pipe: that it lives, and what it has loaded.

A pipe needs no disk, so a full or read-only one does not hide what serves. Each message is one line, shorter than what
the system writes in one piece (``PIPE_BUF``), so none comes torn.
"""

from __future__ import annotations

import contextlib
import os
import select
from dataclasses import dataclass, replace

from kedge_agent.slots import Serving
from kedge_protocol import codec
from kedge_protocol.errors import MessageError

MAX_TEXT = 1000
"""Characters of an error's or a detail's text; the whole is in the log."""


@dataclass(frozen=True, kw_only=True)
class StatusMessage:
    """One message; a sign of life where it names no model."""

    model: str = ""
    serving: Serving | None = None


class StatusWriter:
    """The child's end.

    Args:
        pipe: file descriptor to write to; None where nobody listens.
    """

    def __init__(self, pipe: int | None) -> None:
        self._pipe = pipe
        if pipe is not None:
            os.set_blocking(pipe, False)

    def send(self, word: StatusMessage) -> bool:
        """Whether it was said; False where the agent has not read for long: it is to be said again."""
        if self._pipe is None:
            return True
        serving = word.serving
        if serving is not None:
            short = replace(serving, error=_cut(serving.error), detail=_cut(serving.detail))
            line = codec.encode(replace(word, serving=short)) + b"\n"
            if len(line) > select.PIPE_BUF:
                line = codec.encode(replace(word, serving=replace(short, figures={}, detail=None))) + b"\n"
        else:
            line = codec.encode(word) + b"\n"
        try:
            return os.write(self._pipe, line) == len(line)
        except OSError:
            return False


class StatusReader:
    """The agent's end.

    Args:
        pipe: file descriptor to read from; belongs to this object.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._rest = b""
        os.set_blocking(pipe, False)

    def listen(self) -> list[StatusMessage]:
        """What was told since the last call; what cannot be read is passed over."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._pipe, 1 << 16):
                self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        words = []
        for line in lines:
            with contextlib.suppress(MessageError):
                words.append(codec.decode(line, StatusMessage, where="serving process"))
        return words

    def close(self) -> None:
        """Listen no more."""
        os.close(self._pipe)


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"

"""Reports the serving process's status to the agent over a pipe: that it is alive, and what it has loaded.

A pipe needs no disk, so a full or read-only disk does not hide what serves. Each message is one line, shorter than what
the system writes atomically (``PIPE_BUF``), so none arrives in parts.
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
"""Characters of an error's or a detail's text; the log has all of it."""


@dataclass(frozen=True, kw_only=True)
class StatusMessage:
    """A message; without a model it is a sign of life."""

    model: str = ""
    serving: Serving | None = None


class StatusWriter:
    """The serving process's end of the pipe.

    Args:
        pipe: file descriptor to write to; None if nobody listens.
    """

    def __init__(self, pipe: int | None) -> None:
        self._pipe = pipe
        if pipe is not None:
            os.set_blocking(pipe, False)

    def send(self, word: StatusMessage) -> bool:
        """Send a message; return False if the pipe is full because the agent has not read for long, and it must be sent
        again."""
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
    """The agent's end of the pipe.

    Args:
        pipe: file descriptor to read from; this object closes it.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe
        self._rest = b""
        os.set_blocking(pipe, False)

    def listen(self) -> list[StatusMessage]:
        """Return the messages since the last call; unreadable ones are skipped."""
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
        """Close the pipe."""
        os.close(self._pipe)


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"

"""What the documentation says to type: fenced blocks of Markdown, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

SHELLS = ("console", "bash", "sh", "shell")
_FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,})(?P<info>.*)$")
_TITLE = re.compile(r'title="([^"]+)"')
_REDIRECTION = re.compile(r"(?<=\s)\d?(?:>>?|<)\s*(?:&\d|\S+)")
_SEPARATORS = {"&&", "||", "|", ";", "&"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of its fence, from 1.
        language: the first word of the fence, empty where there is none.
        title: the file that the block is the content of; empty where it is none.
        remark: the HTML comment in the line before the fence; empty where there is none.
    """

    page: Path
    line: int
    language: str
    title: str
    remark: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a block and the output that the page shows below it."""

    where: str
    text: str
    output: tuple[str, ...] = ()


def pages() -> list[Path]:
    """Every page that a reader follows. The changelog tells of the past."""
    named = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md")]
    folders = ("docs", "firmware-configs", "agent", "host", ".github", "deploy")
    return named + sorted(path for folder in folders for path in (ROOT / folder).rglob("*.md"))


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        opened = _FENCE.match(lines[number])
        number += 1
        if opened is None:
            continue
        start, body = number, []
        while number < len(lines) and lines[number].strip() != opened["fence"]:
            body.append(lines[number].removeprefix(opened["indent"]))
            number += 1
        number += 1
        info = opened["info"].strip()
        title = _TITLE.search(info)
        before = lines[start - 2].strip() if start > 1 else ""
        remark = before.removeprefix("<!--").removesuffix("-->").strip() if before.startswith("<!--") else ""
        language = info.split(maxsplit=1)[0] if info else ""
        yield Block(page, start, language, title[1] if title else "", remark, "\n".join(body))


def commands(block: Block) -> list[Command]:
    """The commands of a shell's block. Where a line begins with a prompt, what has none is output."""
    if block.language not in SHELLS:
        return []
    lines = block.text.splitlines()
    prompted = any(line.startswith("$ ") for line in lines)
    found: list[Command] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        number += 1
        if prompted and not line.startswith("$ "):
            if found:
                last = found.pop()
                found.append(Command(last.where, last.text, (*last.output, line)))
            continue
        text = line.removeprefix("$ ")
        while (text.endswith("\\") or _unfinished(text)) and number < len(lines):
            text += "\n" + lines[number]
            number += 1
        if text.strip():
            found.append(Command(f"{block.page.relative_to(ROOT)}:{block.line + number}", text))
    return found


def _unfinished(text: str) -> bool:
    """Whether a quote is still open."""
    try:
        shlex.split(text, comments=True)
    except ValueError:
        return True
    return False


def simple_commands(text: str) -> list[list[str]]:
    """A command line, split at ``&&``, pipes and the like into the words of each command, without redirections."""
    text = _REDIRECTION.sub("", text.replace("\\\n", " "))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in _SEPARATORS:
            found.append([])
        else:
            found[-1].append(word)
    return [words for words in found if words]

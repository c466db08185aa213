"""Formats the tables of all commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click


def printable(text: str) -> str:
    """Return ``text`` without characters that control a terminal."""
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else " " for character in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on a terminal, or untruncated plain columns to a pipe."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        shown = Table(*head, header_style="bold", box=None)
        for row in rows:
            # Text, not markup: what devices say is shown, not obeyed.
            shown.add_row(*(Text(cell) for cell in row))
        Console().print(shown)
        return
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows))
    # At once: each echo is a write of its own.
    click.echo("\n".join(lines))

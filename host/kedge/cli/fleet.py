"""Shared parts of the fleet commands: the state folder, labels, pages, and printing of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from kedge.cli.table import printable

MAX_ROWS = 10**9
NAMED = 20
"""Devices that a line, or lines, name at most."""

state_option = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="State folder [default: KEDGE_FLEET_STATE, or a folder in the user's data directory].",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")


def parse_labels(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """Parse repeated ``key=value`` options."""
    found = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals or not text:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", context, parameter)
        found[key] = text
    return found


select_option = click.option(
    "--select",
    multiple=True,
    callback=parse_labels,
    metavar="KEY=VALUE",
    help="Only devices with this label. Repeat to require several labels.",
)
limit_option = click.option(
    "--limit",
    type=click.IntRange(1, MAX_ROWS),
    metavar="N",
    help="Largest number of rows [default: 50 in a terminal, all in a pipe].",
)
offset_option = click.option(
    "--offset", type=click.IntRange(0, MAX_ROWS), default=0, metavar="N", help="Number of rows to skip."
)

_SHOWN_IN_A_TERMINAL = 50


def page(limit: int | None) -> int | None:
    """Return the maximum number of rows to show."""
    if limit is None and sys.stdout.isatty():
        return _SHOWN_IN_A_TERMINAL
    return limit


def print_remainder(shown: int, offset: int, total: int) -> None:
    """Print which rows a page leaves out."""
    if shown and shown < total:
        click.echo(f"{offset + 1} to {offset + shown} of {total}; more: --limit, --offset, or filters", err=True)


def names_text(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    return " ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def print_skipped(skipped: Mapping[str, str]) -> None:
    """Print which devices were left out, and why."""
    for name, reason in list(skipped.items())[:NAMED]:
        click.echo(printable(f"left out {name}: {reason}"), err=True)
    if (more := len(skipped) - NAMED) > 0:
        click.echo(f"left out {more} more: --json names all", err=True)


def devices_text(count: int) -> str:
    """Return ``1 device``, ``2 devices``, …."""
    return f"{count} device{'s' * (count != 1)}"


def labels_text(labels: dict[str, str]) -> str:
    """Return labels as the text of a table cell."""
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items())) or "-"


def target_text(target: str, told: str | None) -> str:
    """Return a device's target, followed by the one the device reports if that differs."""
    return target if told is None else f"{target} (says {told})"


def show(value: Any, as_json: bool, line: str) -> None:
    """Print one result as JSON or as a line."""
    if as_json:
        show_json(value)
    else:
        click.echo(line)


def print_line(line: str) -> None:
    """Print a line that contains text from devices, which must not control the terminal."""
    click.echo(printable(line))


def show_json(value: Any) -> None:
    """Print a result as JSON; a list with an item a line, as indenting thousands takes as long as finding them."""
    from kedge_protocol import codec

    plain = codec.unstructure(value)
    if isinstance(plain, list) and plain:
        click.echo("[\n" + ",\n".join(map(json.dumps, plain)) + "\n]")
    else:
        click.echo(json.dumps(plain, indent=2))

"""``kedge target``."""

from __future__ import annotations

import click

from kedge_targets import target as targets


@click.group()
def target() -> None:
    """The kinds of device that Kedge knows."""


@target.command("list")
def list_targets() -> None:
    """Show every target: its name, what it is, its backends in order."""
    found = [targets.find(name) for name in targets.names()]
    width = max(len(one.name) for one in found)
    for one in found:
        backends = ", ".join(choice.name for choice in one.backends)
        click.echo(f"{one.name:<{width}}  {one.title} ({one.processor.architecture}): {backends}")

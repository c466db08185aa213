"""``kedge step``: lists the compression steps and their options."""

from __future__ import annotations

import dataclasses

import click

from kedge import steps
from kedge.cli.groups import Group
from kedge.options import described


@click.group("step", cls=Group)
def step() -> None:
    """The compression steps that a recipe or `kedge compile --step` can name."""


@step.command("list")
@click.argument("names", nargs=-1, metavar="[STEP]…")
def list_steps(names: tuple[str, ...]) -> None:
    """List the steps and their options, third-party steps included."""
    for name in names or steps.names():
        found = steps.find(name)
        purpose = " ".join((found.__doc__ or "").strip().partition("\n\n")[0].split())
        click.echo(f"{name}: {purpose}" if purpose else name)
        for field in dataclasses.fields(found.Options):
            click.echo(f"  {described(found.Options, field.name)}")

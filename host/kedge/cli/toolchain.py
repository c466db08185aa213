"""``kedge toolchain``: isolated environments of vendor stacks."""

from __future__ import annotations

import click

from kedge.cli.groups import Group


@click.group(cls=Group)
def toolchain() -> None:
    """Install, list and remove the isolated environments that some backends need."""


@toolchain.command("install")
@click.argument("name")
def install(name: str) -> None:
    """Install the toolchain NAME."""
    from kedge_targets.toolchain import install as install_toolchain

    installed = install_toolchain(name, _show)
    click.echo(f"{name}: installed in {installed.folder}")


@toolchain.command("list")
def list_() -> None:
    """List the toolchains and where they are installed."""
    from kedge_targets.toolchain import list_toolchains

    for state in list_toolchains():
        place = str(state.folder) if state.installed else f"not installed, about {state.disk_bytes >> 20} MiB"
        click.echo(f"{state.name}: {state.description} ({place})")
        for folder in state.outdated:
            click.echo(f"  outdated: {folder}")


@toolchain.command("remove")
@click.argument("name")
def remove(name: str) -> None:
    """Remove every environment of the toolchain NAME."""
    from kedge_targets.toolchain import remove as remove_toolchain

    removed = remove_toolchain(name)
    for folder in removed:
        click.echo(f"{name}: removed {folder}")
    if not removed:
        click.echo(f"{name}: nothing was installed")


def _show(what: str, done: int, total: int) -> None:
    click.echo(f"[{done}/{total}] {what}" if total else what, err=True)

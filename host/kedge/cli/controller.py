"""``kedge controller``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from kedge.cli.fleet import devices_text, json_option, show, state_option
from kedge.cli.groups import Group
from kedge.fleet.options import ControllerOptions
from kedge.fleet.units import size_text
from kedge.options import command_line, made
from kedge.page.options import PageOptions


@click.group(cls=Group)
def controller() -> None:
    """Run the fleet controller, check its health, back up and restore its state."""


@controller.command("run")
@state_option
@command_line(ControllerOptions)
@command_line(PageOptions)
@click.option("-v", "--verbose", is_flag=True, help="Log more details.")
def controller_run(state: Path | None, verbose: bool, **values: Any) -> None:
    """Run the controller until SIGTERM: publish desired states, send blocks, record the devices' reports.

    With --page, serve the page, the JSON routes and /metrics too."""
    from kedge.page import run

    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    run(state, made(ControllerOptions, values), made(PageOptions, values))


@controller.command("health")
@state_option
@json_option
def controller_health(state: Path | None, as_json: bool) -> None:
    """Check whether a controller runs on this state folder and is connected to its broker; exit status 1 if not."""
    from kedge.fleet import health

    found = health.check(state)
    show(found, as_json, f"connected, {found.age_seconds:.0f} s ago")


@controller.command("backup")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@state_option
@json_option
def controller_backup(file: Path, state: Path | None, as_json: bool) -> None:
    """Write a consistent snapshot of the state database to FILE while the controller runs.

    Published blobs are files that never change: copy the folders `blobs` and `maps` of the state folder too, or publish
    the releases again after a restore.
    """
    from kedge.fleet import backup

    saved = backup.save(file, state)
    show(saved, as_json, f"wrote {saved.file} ({size_text(saved.bytes)}): {devices_text(saved.devices)}")


@controller.command("restore")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--force", is_flag=True, help="Replace an existing database; it is kept as fleet.db.before.")
@state_option
@json_option
def controller_restore(file: Path, force: bool, state: Path | None, as_json: bool) -> None:
    """Restore the state database from FILE, which `kedge controller backup` wrote. Stop the controller first."""
    from kedge.fleet import backup

    restored = backup.restore(file, state, force=force)
    for name in restored.incomplete:
        click.echo(f"blobs of {name} are missing: publish it again", err=True)
    show(restored, as_json, f"restored {devices_text(restored.devices)} from {restored.file}")

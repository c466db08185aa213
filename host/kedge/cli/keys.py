"""``kedge keys``."""

from __future__ import annotations

from pathlib import Path

import click

from kedge.cli.fleet import json_option, show, show_json, state_option
from kedge.cli.groups import Group
from kedge.cli.table import table
from kedge.fleet.service import FleetService
from kedge_protocol.trust import Role


@click.group(cls=Group)
def keys() -> None:
    """Show and rotate the keys that sign releases and desired states."""


@keys.command("show")
@state_option
@json_option
def keys_show(state: Path | None, as_json: bool) -> None:
    """Show the keys that the fleet's devices trust, and where the private keys are. They are made on first use."""
    with FleetService(state) as fleet:
        found = fleet.keys()
    if as_json:
        show_json(found)
        return
    table(
        ("role", "key", "public key", "private key"),
        [(one.role, one.id, one.public, "not here" if one.file is None else str(one.file)) for one in found],
    )


@keys.command("rotate")
@click.argument("role", type=click.Choice([one.value for one in Role]))
@click.option(
    "--release-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Release key that signs the rotation [default: the one in the state folder].",
)
@state_option
@json_option
def keys_rotate(role: str, release_key: Path | None, state: Path | None, as_json: bool) -> None:
    """Replace the key of ROLE (release or controller). A release key signs the rotation; devices follow with their next
    desired state, and trust the old key no longer."""
    with FleetService(state) as fleet:
        made = fleet.key_rotate(Role(role), release_key=release_key)
    show(made, as_json, f"made the {made.role} key {made.id} in {made.file}; keep a copy of it elsewhere")

"""``kedge drift``."""

from __future__ import annotations

from pathlib import Path

import click

from kedge.cli.fleet import json_option, show_json, state_option
from kedge.cli.table import table
from kedge.fleet import drift as watched
from kedge.fleet.service import FleetService


@click.command()
@click.option("--model", help="Only this model.")
@click.option(
    "--by",
    multiple=True,
    default=(watched.TARGET,),
    show_default=True,
    help="What divides the devices into cohorts: 'target', or a label's name. Repeat for several.",
)
@click.option("--device", help="Only this device.")
@state_option
@json_option
def drift(model: str | None, by: tuple[str, ...], device: str | None, state: Path | None, as_json: bool) -> None:
    """Compare what devices see and answer with the baseline in their bundle, by cohort, over the last hours."""
    with FleetService(state) as fleet:
        found = watched.cohorts(fleet.database, model=model, by=by, device=device)
    if as_json:
        show_json(found)
        return
    rows = [
        (
            f"{one.model}:{one.version}",
            one.name,
            str(one.devices),
            stream.stream,
            f"{stream.psi:.3f}",
            str(stream.samples) + (f" ({stream.effective} count)" if stream.effective < 0.8 * stream.samples else ""),
            "DRIFT" if stream.alarms else "",
        )
        for one in found
        for stream in one.streams
    ]
    table(("model", "cohort", "devices", "stream", "psi", "samples", "alarm"), rows)

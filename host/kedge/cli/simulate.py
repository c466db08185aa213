"""``kedge simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import click

from kedge.cli.fleet import devices_text, json_option, show
from kedge.fleet.units import span_text


@click.command("simulate")
@click.argument("scenario", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--seed", type=int, help="Seed of everything that is drawn, instead of the scenario's.")
@click.option(
    "--log",
    type=click.File("w", encoding="utf-8"),
    help="Write a line for each event to this file; - for the standard output.",
)
@click.option(
    "--state", type=click.Path(path_type=Path, file_okay=False), help="Empty folder for the fleet's state, which stays."
)
@json_option
def simulate_command(scenario: Path, seed: int | None, log: TextIO | None, state: Path | None, as_json: bool) -> None:
    """Roll a release out to a simulated fleet, as the TOML file SCENARIO describes it, and say how that ends.

    The devices run the real update machine against the real controller, in virtual time: equal scenarios have equal
    outcomes. See docs/simulate.md.
    """
    from kedge.simulator.scenario import read
    from kedge.simulator.virtual import simulate

    found = simulate(read(scenario, seed=seed), state=state, log=log)
    show(
        found,
        as_json,
        f"{found.state} after {span_text(found.seconds)}: {found.reached} of {devices_text(found.total)} reached,"
        f" {found.reverted} of them on the old release, {found.failed} refused it"
        + (f" ({found.reason})" if found.reason else ""),
    )

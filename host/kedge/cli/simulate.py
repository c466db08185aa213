"""``kedge simulate``."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import click

from kedge.cli.fleet import devices_text, json_option, show
from kedge.fleet.options import DEFAULT_LISTEN
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
@click.option(
    "--broker",
    metavar="URL|embedded",
    help="Run in real time on this broker (mqtt://HOST:PORT), or on one that is started for it.",
)
@click.option(
    "--listen",
    default=DEFAULT_LISTEN,
    show_default=True,
    metavar="HOST:PORT",
    help="Listen address of the embedded broker.",
)
@click.option("--page", metavar="HOST:PORT", help="In real time: serve the controller's page at this address.")
@json_option
def simulate_command(
    scenario: Path,
    seed: int | None,
    log: TextIO | None,
    state: Path | None,
    broker: str | None,
    listen: str,
    page: str | None,
    as_json: bool,
) -> None:
    """Roll a release out to a simulated fleet, as the TOML file SCENARIO describes it, and say how that ends.

    The devices run the real update machine against the real controller, in virtual time: equal scenarios have equal
    outcomes. With --broker they do so in real time on a real broker. See docs/simulate.md.
    """
    from kedge.simulator.live import simulate_live
    from kedge.simulator.scenario import read
    from kedge.simulator.virtual import simulate

    document = read(scenario, seed=seed)
    if broker is None:
        found = simulate(document, state=state, log=log)
    else:
        found = simulate_live(document, broker, state=state, listen=listen, page=page, log=log)
    show(
        found,
        as_json,
        f"{found.state} after {span_text(found.seconds)}: {found.reached} of {devices_text(found.total)} reached,"
        f" {found.reverted} of them on the old release, {found.failed} refused it"
        + (f" ({found.reason})" if found.reason else ""),
    )

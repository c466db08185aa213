"""``kedge samples``."""

from __future__ import annotations

from pathlib import Path

import click

from kedge.cli.fleet import devices_text, json_option, print_skipped, select_option, show, show_json, state_option
from kedge.cli.groups import Group
from kedge.cli.table import table
from kedge.fleet import samples as requests
from kedge.fleet.samples import SampleView
from kedge.fleet.service import FleetService
from kedge_protocol.samples import Choice


@click.group(cls=Group)
def samples() -> None:
    """Bring hard inputs home from devices that allow it ([samples] in agent.toml), as a data set."""


@samples.command("request")
@click.option("--model", required=True, help="Name of the model.")
@click.option(
    "--where",
    type=click.Choice([one.value for one in Choice]),
    required=True,
    help="Which inputs: those that a shadow, or the bundle before, answers differently (disagree), or those that the"
    " model is least sure of (low-confidence).",
)
@click.option("--count", type=int, default=50, show_default=True, help="Number of samples from all devices together.")
@select_option
@click.option(
    "--minutes", type=float, default=requests.SECONDS / 60, show_default=True, help="How long devices look for them."
)
@click.option(
    "--mib",
    type=float,
    default=requests.MAX_BYTES / (1 << 20),
    show_default=True,
    help="Largest size, in MiB, of one device's samples.",
)
@click.option("--below", type=float, default=1.0, help="Only inputs with less confidence than this (0 to 1).")
@state_option
@json_option
def samples_request(
    model: str,
    where: str,
    count: int,
    select: dict[str, str],
    minutes: float,
    mib: float,
    below: float,
    state: Path | None,
    as_json: bool,
) -> None:
    """Ask devices for hard inputs of their live calls."""
    with FleetService(state) as fleet:
        options = {"seconds": minutes * 60, "below": below}
        asked = requests.request(fleet, model, Choice(where), count, select, max_bytes=int(mib * (1 << 20)), **options)
    if as_json:
        show_json(asked)
        return
    click.echo(f"request {asked.id}: {devices_text(len(asked.parts))} asked for {count} samples of {model}")
    print_skipped(asked.skipped)


@samples.command("show")
@click.argument("number", type=int, required=False)
@state_option
@json_option
def samples_show(number: int | None, state: Path | None, as_json: bool) -> None:
    """Show how far requests are; with NUMBER, device by device."""
    with FleetService(state) as fleet:
        found = requests.show(fleet, number)
    if as_json:
        show_json(found)
    elif number is None:
        heads = ("request", "model", "where", "state", "devices", "asked for", "came")
        table(heads, [_row(one) for one in found])
    else:
        rows = [
            (part.device, part.state, str(part.seen), str(part.kept), str(part.samples), part.detail)
            for part in found[0].parts
        ]
        table(("device", "state", "seen", "kept", "came", "detail"), rows)


def _row(one: SampleView) -> tuple[str, ...]:
    return (str(one.id), one.model, one.where.value, one.state, str(len(one.parts)), str(one.count), str(one.samples))


@samples.command("cancel")
@click.argument("number", type=int)
@state_option
@json_option
def samples_cancel(number: int, state: Path | None, as_json: bool) -> None:
    """End a request; devices drop what they have chosen."""
    with FleetService(state) as fleet:
        found = requests.cancel(fleet, number)
    show(found, as_json, f"request {number} is {found.state}; {found.samples} samples came home")


@samples.command("fetch")
@click.argument("number", type=int)
@click.option("-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The .npz to write.")
@state_option
@json_option
def samples_fetch(number: int, out: Path, state: Path | None, as_json: bool) -> None:
    """Write what came home as a data set for `kedge compile --evaluation`."""
    with FleetService(state) as fleet:
        written = requests.export(fleet, number, out)
    left = f" ({written.left_out} left out)" if written.left_out else ""
    show(written, as_json, f"{written.samples} samples in {written.path}{left}; {written.about} tells where from")


@samples.command("remove")
@click.argument("number", type=int)
@state_option
def samples_remove(number: int, state: Path | None) -> None:
    """Delete a request and what came home."""
    with FleetService(state) as fleet:
        requests.remove(fleet, number)
    click.echo(f"request {number} and its samples are deleted")

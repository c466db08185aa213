"""``kedge shadow``."""

from __future__ import annotations

from pathlib import Path

import click

from kedge.cli.fleet import devices_text, json_option, names_text, select_option, show_json, state_option
from kedge.cli.groups import Group
from kedge.cli.table import table
from kedge.fleet import shadows
from kedge.fleet.service import FleetService


@click.group(cls=Group)
def shadow() -> None:
    """Run a release beside the one that serves, on a sample of the devices' live inputs. It answers nobody, and no
    input leaves a device: only counts do."""


@shadow.command("start")
@click.argument("reference", metavar="NAME:VERSION")
@select_option
@click.option(
    "--share",
    type=float,
    default=shadows.SHARE,
    show_default=True,
    help="Share of one processor core that it may take.",
)
@click.option(
    "--memory-mib",
    type=int,
    default=shadows.MEMORY_BYTES >> 20,
    show_default=True,
    help="Memory, in MiB, that it may take.",
)
@state_option
@json_option
def shadow_start(
    reference: str, select: dict[str, str], share: float, memory_mib: int, state: Path | None, as_json: bool
) -> None:
    """Run a release's bundles as shadows of the same model."""
    with FleetService(state) as fleet:
        told = shadows.start(fleet, reference, select, share=share, memory_bytes=memory_mib << 20)
    if as_json:
        show_json(told)
    else:
        click.echo(f"{reference} runs as a shadow on {devices_text(len(told))}: {names_text(told)}")


@shadow.command("stop")
@click.argument("model")
@select_option
@state_option
@json_option
def shadow_stop(model: str, select: dict[str, str], state: Path | None, as_json: bool) -> None:
    """End the shadows of a model."""
    with FleetService(state) as fleet:
        told = shadows.stop(fleet, model, select)
    if as_json:
        show_json(told)
    else:
        click.echo(f"{len(told)} shadow{'s' * (len(told) != 1)} of {model} ended")


@shadow.command("show")
@click.argument("model", required=False)
@state_option
@json_option
def shadow_show(model: str | None, state: Path | None, as_json: bool) -> None:
    """Show what the shadows answered, by device."""
    with FleetService(state) as fleet:
        found = shadows.show(fleet, model)
    if as_json:
        show_json(found)
        return
    rows = []
    for one in found:
        stands = "not reported yet" if one.state is None else f"{one.state.state.value}, {one.state.detail or ''}"
        agreement = f"{one.agreed / one.compared:.1%}" if one.compared else "–"
        least = one.worst
        worst = "–" if least is None else f"{least[0]}: {least[1]:.1%}"
        shift = "–" if one.confidence_shift is None else f"{one.confidence_shift:+.3f}"
        times = f"{one.old_p95_ms:.2f} → {one.new_p95_ms:.2f} ms"
        counts = (str(one.compared), agreement, worst, shift, str(one.errors), times)
        rows.append((one.device, one.model, one.digest[7:19], stands, *counts))
    heads = ("device", "model", "shadow", "state", "compared", "agree", "worst class", "confidence", "errors", "p95")
    table(heads, rows)

"""``kedge rollout``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from kedge.cli import fleet as shared
from kedge.cli.fleet import json_option, select_option, show, show_json, state_option
from kedge.cli.table import table
from kedge.fleet.results import DeviceRollout, Progress, RolloutStatus, RolloutSummary
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService
from kedge.fleet.units import size_text, span_text


@click.group()
def rollout() -> None:
    """Roll a release out to devices."""


@rollout.command("start")
@click.argument("release", metavar="NAME:VERSION")
@select_option
@state_option
@json_option
def rollout_start(release: str, select: dict[str, str], state: Path | None, as_json: bool) -> None:
    """Roll NAME:VERSION out to all selected devices at once."""
    with FleetService(state) as fleet:
        started = fleet.rollout_start(release, select)
    for name, reason in list(started.skipped.items())[:_NAMED]:
        click.echo(f"left out {name}: {reason}", err=True)
    if (more := len(started.skipped) - _NAMED) > 0:
        click.echo(f"left out {more} more: --json names all", err=True)
    count = started.rollout.matching
    show(started, as_json, f"rollout {started.rollout.id}: {release} to {shared.devices_text(count)}")


_NAMED = 20


@rollout.command("list")
@click.option(
    "--limit",
    type=click.IntRange(1, shared.MAX_ROWS),
    default=20,
    show_default=True,
    metavar="N",
    help="Number of rollouts to show.",
)
@state_option
@json_option
def rollout_list(limit: int, state: Path | None, as_json: bool) -> None:
    """List the latest rollouts, newest first, with the number of devices in each state."""
    with FleetService(state) as fleet:
        found = fleet.rollouts(limit=limit)
    if as_json:
        show_json(found)
        return
    rows = [
        (
            str(one.id),
            f"{one.model}:{one.version}",
            one.kind,
            _state(one),
            shared.labels_text(one.selected),
            span_text(time.time() - one.started_at) + " ago",
            _counts(one),
        )
        for one in found
    ]
    table(("rollout", "release", "kind", "state", "labels", "begun", "devices"), rows)


@rollout.command("status")
@click.argument("number", type=int, required=False)
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait up to this long for the rollout to finish.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([one.value for one in Progress]),
    help="Only devices in this state. Repeat to include several states.",
)
@select_option
@shared.limit_option
@shared.offset_option
@state_option
@json_option
def rollout_status(
    number: int | None,
    wait: float,
    only: tuple[str, ...],
    select: dict[str, str],
    limit: int | None,
    offset: int,
    state: Path | None,
    as_json: bool,
) -> int:
    """Show the state of rollout NUMBER (default: the latest): counts, then devices. With --wait, the exit status is 1
    unless all devices are done."""
    shown = DeviceFilter(
        progress=frozenset(map(Progress, only)),
        select=select,
        limit=limit if as_json else shared.page(limit),
        offset=offset,
    )
    with FleetService(state) as fleet:
        status = fleet.rollout_status(number, wait=wait, shown=shown)
    if as_json:
        show_json(status)
    else:
        _show(status, offset)
    return 1 if wait and not status.done else 0


@rollout.command("revert")
@click.argument("number", type=int, required=False)
@state_option
@json_option
def rollout_revert(number: int | None, state: Path | None, as_json: bool) -> None:
    """Revert rollout NUMBER (default: the latest): each device gets its previous desired release back, unless a newer
    rollout has taken the device over."""
    with FleetService(state) as fleet:
        status = fleet.rollout_revert(number)
    show(
        status,
        as_json,
        f"rollout {status.id}: {status.model} back to {status.version} on {shared.devices_text(status.matching)}",
    )


def _show(status: RolloutStatus, offset: int) -> None:
    click.echo(f"rollout {status.id}: {status.model}:{status.version} ({status.kind}, {_state(status)})")
    click.echo(_counts(status))
    table(
        ("device", "target", "progress", "wanted", "serves", "sent", "received", "detail"),
        [_row(one) for one in status.devices],
    )
    shared.print_remainder(len(status.devices), offset, status.matching)


def _row(one: DeviceRollout) -> tuple[str, ...]:
    progress = one.progress.value
    if one.progress is Progress.FETCHING and one.blocks_total:
        progress = f"{progress} {one.blocks_done}/{one.blocks_total}"
    digests = [digest[7:19] if digest else "none" for digest in (one.digest, one.serving)]
    moved = (size_text(one.bytes_sent), size_text(one.bytes_received))
    return (one.device, shared.target_text(one.target, one.reported_target), progress, *digests, *moved, one.detail)


def _state(one: RolloutSummary) -> str:
    return "done" if one.done else one.state


def _counts(one: RolloutSummary) -> str:
    total = sum(one.counts.values())
    counts = ", ".join(f"{count} {name}" for name, count in one.counts.items())
    return f"{shared.devices_text(total)}: {counts}" if total else "no devices"

"""``kedge rollout``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from kedge.cli import fleet as shared
from kedge.cli.fleet import json_option, select_option, show, show_json, state_option
from kedge.cli.groups import Group
from kedge.cli.policy_options import parse_policy, policy_options, split_selectors
from kedge.cli.rollout_orders import COMMANDS, phase_text, stage_lines
from kedge.cli.table import table
from kedge.fleet.results import DeviceRollout, Progress, RolloutPlan, RolloutStatus, RolloutSummary, TargetChoice
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService
from kedge.fleet.staged.policy import Busy, Policy
from kedge.fleet.units import size_text, span_text


@click.group(cls=Group)
def rollout() -> None:
    """Roll a release out to devices."""


for _command in COMMANDS:
    rollout.add_command(_command)


@rollout.command("start")
@click.argument("release", metavar="NAME:VERSION")
@click.option(
    "--select",
    multiple=True,
    metavar="SELECTOR",
    help="Only devices that meet this: a label KEY=VALUE, or terms such as 'site=berlin,target in (rpi4,rpi5),"
    "agent>=0.3,hash<10%'. Repeat to require all.",
)
@policy_options
@click.option("--dry-run", is_flag=True, help="Show which device is in which wave, and start nothing.")
@state_option
@json_option
def rollout_start(
    release: str,
    select: tuple[str, ...],
    policy_file: Path | None,
    dry_run: bool,
    state: Path | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Roll NAME:VERSION out to all selected devices: at once, or in waves as a policy says.

    The policy is the file --policy, or the defaults if any of the options from --gate to --retries is given.
    """
    labels, selectors = split_selectors(select)
    policy = parse_policy(policy_file, selectors, given)
    with FleetService(state) as fleet:
        if dry_run:
            _show_plan(fleet.rollout_plan(release, labels, policy=policy or Policy(waves=("100%",))), as_json)
            return
        started = fleet.rollout_start(release, labels, policy=policy)
    shared.print_skipped(started.skipped)
    count, stage = started.rollout.matching, started.rollout.stage
    waves = f" in {stage.planned} wave{'s' * (stage.planned != 1)}" if stage is not None else ""
    show(started, as_json, f"rollout {started.rollout.id}: {release} to {shared.devices_text(count)}{waves}")


def _show_plan(plan: RolloutPlan, as_json: bool) -> None:
    if as_json:
        show_json(plan)
        return
    waves = f"{len(plan.waves)} wave{'s' * (len(plan.waves) != 1)}"
    moved = size_text(plan.bytes)
    click.echo(f"{plan.release} would go to {shared.devices_text(plan.devices)} in {waves}; {moved} would move")
    rows = [
        (
            str(wave.number),
            target,
            str(len(names)),
            size_text(wave.bytes) if not place else "",
            shared.names_text(names),
        )
        for wave in plan.waves
        for place, (target, names) in enumerate(wave.devices.items())
    ]
    table(("wave", "target", "devices", "bytes of the wave", "names"), rows)
    for one in plan.shortfalls:
        others = "the others are in earlier waves" if one.wave > 1 else "there are no more"
        click.echo(f"wave {one.wave} has {one.devices} of target {one.target}, not {one.wanted}: {others}", err=True)
    for wave, targets in plan.powerless.items():
        for target, gates in targets.items():
            click.echo(f"wave {wave} has too few devices of {target} for {', '.join(gates)} to fail", err=True)
    for number in plan.in_the_way:
        what = "waits for" if plan.policy.busy is Busy.QUEUE else "supersedes"
        click.echo(f"it {what} rollout {number} on devices that both have", err=True)
    shared.print_skipped(plan.skipped)


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
@click.option("--gates", "each_gate", is_flag=True, help="Show the evidence of each gate on each target.")
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
    each_gate: bool,
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
        _show(status, offset, each_gate=each_gate)
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


def _show(status: RolloutStatus, offset: int, *, each_gate: bool) -> None:
    click.echo(f"rollout {status.id}: {status.model}:{status.version} ({status.kind}, {_state(status)})")
    click.echo(_counts(status))
    if status.stage is not None:
        for line in stage_lines(status, time.time(), each_gate=each_gate)[2:]:
            shared.print_line(line)
    for choice in status.choices:
        shared.print_line(choice_text(choice))
    if status.counts and not status.matching:
        click.echo("none of its devices meets --only and --select", err=True)
        return
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
    detail = "; ".join(filter(None, (one.detail, f"{one.backend}: {one.choice}" if one.backend else "")))
    return (one.device, shared.target_text(one.target, one.reported_target), progress, *digests, *moved, detail)


def choice_text(choice: TargetChoice) -> str:
    """Return which of several bundles the devices of a target have, and why."""
    parts = []
    for one in choice.backends:
        known = "not measured" if one.p50_ms is None else f"{one.p50_ms:.3g} ms on {shared.devices_text(one.measured)}"
        known += f" with {one.figures_of}" if one.figures_of else ""
        refused = f", refused by {one.refused}" if one.refused else ""
        parts.append(f"{one.backend} on {one.devices} ({known}{refused})")
    for count, words in ((choice.measuring, "measuring"), (choice.waiting, "waiting for figures")):
        parts += [f"{count} {words}"] if count else []
    return f"{choice.target}: {', '.join(parts)}"


def _state(one: RolloutSummary) -> str:
    if one.stage is not None:
        return phase_text(one.stage)
    return "done" if one.done else one.state


def _counts(one: RolloutSummary) -> str:
    total = sum(one.counts.values())
    counts = ", ".join(f"{count} {name}" for name, count in one.counts.items())
    return f"{shared.devices_text(total)}: {counts}" if total else "no devices"

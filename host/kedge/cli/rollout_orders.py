"""The commands of ``kedge rollout`` that a person gives to a staged rollout under way, and the one that watches it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import click

from kedge.cli import fleet as shared
from kedge.cli.fleet import json_option, show, state_option
from kedge.cli.table import printable
from kedge.fleet.results import RolloutStatus, StageView
from kedge.fleet.rollout_status import DeviceFilter, is_settled
from kedge.fleet.service import FleetService
from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.policy import OnAbort
from kedge.fleet.units import span_text

_COUNTS_ONLY = DeviceFilter(limit=0)
_WORST_FIRST = (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS)
_NAMED = 4
"""Targets that a line names."""


@click.command("pause")
@click.argument("number", type=int, required=False)
@state_option
@json_option
def rollout_pause(number: int | None, state: Path | None, as_json: bool) -> None:
    """Pause rollout NUMBER (default: the latest): no further device is told. Devices that were told go on, and the
    gates go on watching."""
    with FleetService(state) as fleet:
        _shown(fleet.rollout_pause(number), as_json)


@click.command("resume")
@click.argument("number", type=int, required=False)
@state_option
@json_option
def rollout_resume(number: int | None, state: Path | None, as_json: bool) -> None:
    """Let the paused rollout NUMBER (default: the latest) go on."""
    with FleetService(state) as fleet:
        _shown(fleet.rollout_resume(number), as_json)


@click.command("abort")
@click.argument("number", type=int, required=False)
@click.option("--keep", "how", flag_value="keep", help="Leave the new release on the devices that it reached.")
@click.option("--revert", "how", flag_value="revert", help="Give these devices their previous release back.")
@click.option("--reason", default="", metavar="TEXT", help="Reason for the audit log.")
@state_option
@json_option
def rollout_abort(number: int | None, how: str | None, reason: str, state: Path | None, as_json: bool) -> None:
    """Abort rollout NUMBER (default: the latest): no further device is told. The devices that it reached go back or
    keep what they have, as its policy says, or as --revert and --keep do."""
    with FleetService(state) as fleet:
        _shown(fleet.rollout_abort(number, on_abort=OnAbort(how) if how else None, reason=reason), as_json)


@click.command("promote")
@click.argument("number", type=int, required=False)
@state_option
@json_option
def rollout_promote(number: int | None, state: Path | None, as_json: bool) -> None:
    """Begin the next wave of rollout NUMBER (default: the latest) now, without waiting for its soak time or for gates
    that have not decided."""
    with FleetService(state) as fleet:
        _shown(fleet.rollout_promote(number), as_json)


@click.command("retry")
@click.argument("number", type=int, required=False)
@click.option("--device", "devices", multiple=True, metavar="NAME", help="Only this device. Repeat for several.")
@state_option
@json_option
def rollout_retry(number: int | None, devices: tuple[str, ...], state: Path | None, as_json: bool) -> None:
    """Tell the devices of rollout NUMBER (default: the latest) again that failed or did not answer in time."""
    with FleetService(state) as fleet:
        _shown(fleet.rollout_retry(number, devices or None), as_json)


@click.command("watch")
@click.argument("number", type=int, required=False)
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)
@state_option
def rollout_watch(number: int | None, interval: float, state: Path | None) -> int:
    """Watch rollout NUMBER (default: the latest) until it ends: live in a terminal, a line for each change in a pipe.
    The exit status is 0 if every device serves the release, else 1."""
    with FleetService(state) as fleet:
        number = fleet.rollout_status(number, shown=_COUNTS_ONLY).id
        looks = _looks(lambda: fleet.rollout_status(number, shown=_COUNTS_ONLY), interval)
        last = _watch_live(looks) if sys.stdout.isatty() else _watch_lines(looks)
    return 0 if last.done else 1


def _looks(look: Callable[[], RolloutStatus], interval: float) -> Iterator[RolloutStatus]:
    while True:
        status = look()
        yield status
        if is_settled(status):
            return
        time.sleep(interval)


def _watch_lines(looks: Iterator[RolloutStatus]) -> RolloutStatus:
    before = ""
    for status in looks:
        line = stage_text(status)
        if line != before:
            click.echo(printable(line))
            before = line
        last = status
    return last


def _watch_live(looks: Iterator[RolloutStatus]) -> RolloutStatus:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(refresh_per_second=4) as live:
        for status in looks:
            live.update(Group(*(Text(printable(line)) for line in stage_lines(status, time.time()))))
            last = status
    return last


def stage_text(status: RolloutStatus) -> str:
    """Return where a rollout stands, in one line."""
    counts = ", ".join(f"{count} {name}" for name, count in status.counts.items())
    stage = status.stage
    if stage is None:
        return f"rollout {status.id}: {status.state}: {counts}"
    place = f", wave {stage.wave} of {stage.planned}" if stage.wave else ""
    reason = f" ({stage.reason})" if stage.reason else ""
    return f"rollout {status.id}: {phase_text(stage)}{place}{reason}: {counts}"


def stage_lines(status: RolloutStatus, now: float, *, each_gate: bool = False) -> list[str]:
    """Return where a rollout stands, in a few lines: its waves, and what its gates said last.

    Args:
        now: seconds since 1970.
        each_gate: whether each gate on each target has its line; else only those that fail.
    """
    counts = ", ".join(f"{count} {name}" for name, count in status.counts.items())
    stage = status.stage
    lines = [f"rollout {status.id}: {status.model}:{status.version}", counts]
    if stage is None:
        return [lines[0], f"{status.state}: {counts}"]
    because = f": {stage.reason}" if stage.reason else ""
    lines.append(f"{phase_text(stage)} for {span_text(now - stage.since)}{because}")
    if stage.reverted_by:
        lines.append(f"taken back by rollout {stage.reverted_by}")
    for wave in stage.waves:
        steps = ", ".join(f"{count} {name}" for name, count in wave.steps.items())
        late = " (came later)" if wave.number > stage.planned else ""
        mark = ">" if wave.number == stage.wave else " "
        lines.append(f"{mark} wave {wave.number}{late}: {shared.devices_text(wave.devices)}: {steps}")
    return lines + gate_lines(stage.gates, each=each_gate)


def gate_lines(results: Sequence[GateResult], *, each: bool = False) -> list[str]:
    """Return what gates say: those that fail first, a line each; of those that are undecided or pass a line for each
    gate, with its targets.

    Args:
        each: a line for each gate on each target instead.
    """
    lines: list[str] = []
    grouped: dict[tuple[Verdict, str], list[GateResult]] = {}
    for verdict in _WORST_FIRST:
        for result in results:
            if result.verdict is not verdict:
                continue
            if each or verdict is Verdict.FAIL:
                lines.append(f"  {verdict.value:<9} {result.gate} of {result.target}: {result.detail}")
            else:
                grouped.setdefault((verdict, result.gate), []).append(result)
    for (verdict, gate), some in grouped.items():
        targets = ", ".join(result.target for result in some) if len(some) <= _NAMED else f"{len(some)} targets"
        detail = (
            f": {some[0].detail}" if verdict is Verdict.UNDECIDED and len({one.detail for one in some}) == 1 else ""
        )
        lines.append(f"  {verdict.value:<9} {gate} of {targets}{detail}")
    return lines


def phase_text(stage: StageView) -> str:
    """Return the phase, and whether it is paused."""
    return f"{stage.phase.value}, paused" if stage.paused else stage.phase.value


def _shown(status: RolloutStatus, as_json: bool) -> None:
    show(status, as_json, stage_text(status))


COMMANDS = (rollout_pause, rollout_resume, rollout_abort, rollout_promote, rollout_retry, rollout_watch)

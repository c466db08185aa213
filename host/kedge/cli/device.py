"""``kedge device``."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from kedge.cli import fleet as shared
from kedge.cli.fleet import (
    json_option,
    labels_text,
    limit_option,
    offset_option,
    parse_labels,
    print_line,
    select_option,
    show,
    show_json,
    state_option,
    target_text,
)
from kedge.cli.groups import Group
from kedge.cli.table import printable, table
from kedge.fleet.options import KitOptions
from kedge.fleet.results import DeviceRow, DeviceView
from kedge.fleet.service import FleetService
from kedge.fleet.units import size_text, span_text
from kedge.options import command_line, made
from kedge_protocol import codec
from kedge_protocol.errors import StorageError


@click.group(cls=Group)
def device() -> None:
    """Manage the devices of the fleet."""


@device.command("add")
@click.argument("name")
@click.option("--target", required=True, help="A target's name, or the path of a .toml file.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=parse_labels,
    metavar="KEY=VALUE",
    help="Label of the device, for --select. Repeat for several.",
)
@command_line(KitOptions)
@state_option
@json_option
def device_add(
    name: str, target: str, labels: dict[str, str], state: Path | None, as_json: bool, **values: Any
) -> None:
    """Register the device NAME; --kit also writes the setup kit of its board."""
    options = made(KitOptions, values)
    with FleetService(state) as fleet:
        added = fleet.device_add(name, target, labels, options=options)
    if options.kit is not None and options.broker is None:
        click.echo("no --broker: the address in the kit's agent.toml is an example", err=True)
    kit = "" if options.kit is None else f"; its kit is {options.kit}: keep it as you keep its password"
    show(added, as_json, f"added {added.name} ({added.target}){kit}")


@device.command("list")
@select_option
@limit_option
@offset_option
@state_option
@json_option
def device_list(select: dict[str, str], limit: int | None, offset: int, state: Path | None, as_json: bool) -> None:
    """List the devices with presence, labels and the models they serve. --json prints everything known about each."""
    with FleetService(state) as fleet:
        if as_json:
            show_json(fleet.devices(select))
            return
        found = fleet.device_list(select, limit=shared.page(limit), offset=offset)
    rows = [
        (one.name, target_text(one.target, one.reported_target), labels_text(one.labels), _presence(one), _serving(one))
        for one in found.devices
    ]
    table(("device", "target", "labels", "presence", "serves"), rows)
    click.echo(f"{shared.devices_text(found.total)}, {found.online} online", err=True)
    shared.print_remainder(len(rows), offset, found.total)


@device.command("show")
@click.argument("name")
@state_option
@json_option
def device_show(name: str, state: Path | None, as_json: bool) -> None:
    """Show everything known about the device NAME."""
    with FleetService(state) as fleet:
        detail = fleet.device(name)
    if as_json:
        show_json(detail)
        return
    one = detail.device
    print_line(
        f"{one.name}  target {target_text(one.target, one.reported_target)}  "
        f"{labels_text(one.labels)}  {_presence(one)}"
    )
    for model, digest in one.desired.items():
        print_line(f"shall serve {model} {digest} (version {one.desired_version})")
    if one.reported is not None:
        said = one.reported
        runtimes = ", ".join(f"{name} {version}" for name, version in sorted(said.runtimes.items()))
        print_line(f"agent {said.agent_version}, Python {said.python}, {said.architecture}, {runtimes or 'no runtime'}")
        print_line(f"free {size_text(said.free_bytes)}  endpoint {said.endpoint or 'none'}")
        for model, view in said.models.items():
            proved = "proved" if view.proved else "not proved"
            speed = "" if view.latency is None else f", {view.latency.p50_ms:.2f} ms a call"
            print_line(f"{model}: {view.state.value}, serves {view.digest or 'nothing'} ({proved}{speed})")
            if view.detail:
                print_line(f"  {view.detail}")
            if view.failure is not None:
                print_line(f"  refused {view.failure.digest}: {view.failure.stage}: {view.failure.reason}")
    if detail.telemetry:
        _latest_telemetry(detail.telemetry[-1])
    rows = [
        (
            transfer.digest[7:19],
            transfer.kind,
            size_text(transfer.size),
            str(transfer.blocks_served),
            str(transfer.blocks_distinct),
            str(transfer.finished_served_again),
            size_text(transfer.bytes_served),
        )
        for transfer in detail.transfers
    ]
    if rows:
        table(("blob", "kind", "size", "blocks sent", "distinct", "finished sent again", "bytes sent"), rows)
    print_line(f"sent in all: {size_text(detail.bytes_served)}")


def _latest_telemetry(latest: Any) -> None:
    warmth = "" if latest.temperature_c is None else f", {latest.temperature_c:.0f} °C"
    used = latest.memory_total_bytes - latest.memory_available_bytes
    print_line(
        f"CPU {latest.cpu_percent:.0f} %, memory {size_text(used)} of {size_text(latest.memory_total_bytes)}{warmth}"
    )
    if latest.board is not None:
        _board(latest.board)
    for model, view in latest.models.items():
        latency = ", ".join(f"{name} {value:.2f} ms" for name, value in sorted(view.latency_ms.items()))
        print_line(f"{model}: {view.inferences_total} inferences, {view.errors_total} errors; {latency or 'no calls'}")
        if view.figures:
            print_line("  " + ", ".join(f"{name} {value:.6g}" for name, value in sorted(view.figures.items())))


def _board(told: Any) -> None:
    load = [] if told.gpu_percent is None else [f"GPU {told.gpu_percent:.0f} %"]
    mode = [] if told.power_mode is None else [f"mode {told.power_mode}"]
    power = [f"{rail} {value / 1000:.1f} W" for rail, value in told.power_mw.items()]
    warmth = [f"{zone} {value:.0f} °C" for zone, value in told.temperatures_c.items()]
    print_line(", ".join([*load, *mode, *power, *warmth]))


@device.command("latencies")
@click.option("--target", help="Only devices of this target.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON to this file.")
@state_option
@json_option
def device_latencies(target: str | None, output: Path | None, state: Path | None, as_json: bool) -> None:
    """Show the latency of each bundle as measured on the devices. -o writes a file for `kedge compile --latencies`."""
    with FleetService(state) as fleet:
        found = fleet.latencies(target)
    if output is not None:
        try:
            output.write_text(json.dumps(codec.unstructure(found), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(output)) from error
    if as_json:
        show_json(found)
        return
    rows = [
        (one.device, one.target, one.bundle[7:19], f"{one.p50_ms:.3f}", f"{one.p95_ms:.3f}", str(one.calls))
        for one in found.measurements
    ]
    table(("device", "target", "bundle", "p50 ms", "p95 ms", "calls"), rows)


@device.command("edit")
@click.argument("name")
@click.option(
    "--label",
    "labels",
    multiple=True,
    callback=parse_labels,
    metavar="KEY=VALUE",
    help="Set this label. Repeat for several.",
)
@click.option("--without", multiple=True, metavar="KEY", help="Remove the label with this key. Repeat for several.")
@state_option
@json_option
def device_edit(name: str, labels: dict[str, str], without: tuple[str, ...], state: Path | None, as_json: bool) -> None:
    """Change the labels of the device NAME. Rollouts read labels when they start, so the device's desired models stay
    the same."""
    if not labels and not without:
        raise click.UsageError("nothing to change: give --label or --without")
    with FleetService(state) as fleet:
        edited = fleet.device_edit(name, labels, without)
    show(edited, as_json, f"{edited.name}: {labels_text(edited.labels)}")


@device.command("report")
@click.argument("name")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait for the answer.",
)
@state_option
@json_option
def device_report(name: str, wait: float, state: Path | None, as_json: bool) -> int:
    """Ask the device NAME, through the running controller, for a fresh report. Exit status 1 if no answer comes."""
    with FleetService(state) as fleet:
        asked = fleet.device_report(name, wait=wait)
    if asked.ok is None:
        line = (
            "was asked, and has not answered" if asked.sent else "was not asked: no controller sent it, does one run?"
        )
    else:
        line = "reported" if asked.ok else f"did not: {asked.detail}"
    show(asked, as_json, f"{name} {printable(line)}")
    return 0 if asked.ok else 1


@device.command("remove")
@click.argument("name")
@state_option
def device_remove(name: str, state: Path | None) -> None:
    """Remove the device NAME from the fleet. The device keeps serving its current models."""
    with FleetService(state) as fleet:
        fleet.device_remove(name)
    click.echo(f"removed {name}")


def _presence(one: DeviceView | DeviceRow) -> str:
    if one.online:
        return "online"
    return f"away, seen {span_text(time.time() - one.seen_at)} ago" if one.seen_at else "never seen"


def _serving(one: DeviceRow) -> str:
    if not one.heard:
        return "-"
    return ", ".join(f"{name}:{version or '?'}" for name, version in one.serves.items()) or "nothing"

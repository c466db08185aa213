"""``kedge controller``, ``kedge device``, ``kedge publish``, ``kedge rollout``."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import click

from kedge.cli.table import printable, table
from kedge.fleet.controller import ControllerOptions, run
from kedge.fleet.kit import KitOptions
from kedge.fleet.results import DeviceView, Progress, RolloutStatus
from kedge.fleet.service import FleetService
from kedge.options import command_line, made
from kedge_protocol import codec
from kedge_protocol.errors import StorageError

_state = click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="The state folder [KEDGE_FLEET_STATE, else in the user's data folder].",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


def _labels_given(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """``key=value``, several times."""
    labels = {}
    for value in values:
        key, equals, text = value.partition("=")
        if not key or not equals or not text:
            raise click.BadParameter(f"{value!r} is not KEY=VALUE", context, parameter)
        labels[key] = text
    return labels


_select = click.option(
    "--select",
    multiple=True,
    callback=_labels_given,
    metavar="KEY=VALUE",
    help="Only devices with this label; repeat for and.",
)


@click.group()
def controller() -> None:
    """Run the controller of a fleet."""


@controller.command("run")
@_state
@command_line(ControllerOptions)
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def controller_run(state: Path | None, verbose: bool, **values: Any) -> None:
    """Run until SIGTERM: publish what is wanted, send blocks, note what devices say."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    run(state, made(ControllerOptions, values))


@click.group()
def device() -> None:
    """The devices of a fleet."""


@device.command("add")
@click.argument("name")
@click.option("--target", required=True, help="A known target, or the path of a .toml file.")
@click.option("--label", "labels", multiple=True, callback=_labels_given, metavar="KEY=VALUE", help="For --select.")
@command_line(KitOptions)
@_state
@_json
def device_add(
    name: str, target: str, labels: dict[str, str], state: Path | None, as_json: bool, **values: Any
) -> None:
    """Make the device NAME known; with --kit also write what makes its board ready."""
    options = made(KitOptions, values)
    with FleetService(state) as fleet:
        added = fleet.device_add(name, target, labels, options=options)
    if options.kit is not None and options.broker is None:
        click.echo("no --broker: the address in the kit's agent.toml is an example", err=True)
    kit = "" if options.kit is None else f"; its kit is {options.kit}: keep it as you keep its password"
    _print(added, as_json, f"added {added.name} ({added.target}){kit}")


@device.command("list")
@_select
@_state
@_json
def device_list(select: dict[str, str], state: Path | None, as_json: bool) -> None:
    """Show the devices: presence, labels, what each serves."""
    with FleetService(state) as fleet:
        found = fleet.devices(select)
    if as_json:
        _echo_json(found)
        return
    rows = [(one.name, one.target, _labels(one.labels), _presence(one), _serving(one)) for one in found]
    table(("device", "target", "labels", "presence", "serves"), rows)


@device.command("show")
@click.argument("name")
@_state
@_json
def device_show(name: str, state: Path | None, as_json: bool) -> None:
    """Show all that is known of the device NAME."""
    with FleetService(state) as fleet:
        detail = fleet.device(name)
    if as_json:
        _echo_json(detail)
        return
    one = detail.device
    _say(f"{one.name}  target {one.target}  {_labels(one.labels)}  {_presence(one)}")
    for model, digest in one.desired.items():
        _say(f"shall serve {model} {digest} (version {one.desired_version})")
    if one.reported is not None:
        said = one.reported
        runtimes = ", ".join(f"{name} {version}" for name, version in sorted(said.runtimes.items()))
        _say(f"agent {said.agent_version}, Python {said.python}, {said.architecture}, {runtimes or 'no runtime'}")
        _say(f"free {_size(said.free_bytes)}  endpoint {said.endpoint or 'none'}")
        for model, view in said.models.items():
            proved = "proved" if view.proved else "not proved"
            speed = "" if view.latency is None else f", {view.latency.p50_ms:.2f} ms a call"
            _say(f"{model}: {view.state.value}, serves {view.digest or 'nothing'} ({proved}{speed})")
            if view.detail:
                _say(f"  {view.detail}")
            if view.failure is not None:
                _say(f"  refused {view.failure.digest}: {view.failure.stage}: {view.failure.reason}")
    if detail.telemetry:
        _latest_telemetry(detail.telemetry[-1])
    rows = [
        (
            transfer.digest[7:19],
            transfer.kind,
            _size(transfer.size),
            str(transfer.blocks_served),
            str(transfer.blocks_distinct),
            str(transfer.finished_served_again),
            _size(transfer.bytes_served),
        )
        for transfer in detail.transfers
    ]
    if rows:
        table(("blob", "kind", "size", "blocks sent", "distinct", "finished sent again", "bytes sent"), rows)
    _say(f"sent in all: {_size(detail.bytes_served)}")


def _latest_telemetry(latest: Any) -> None:
    warmth = "" if latest.temperature_c is None else f", {latest.temperature_c:.0f} °C"
    used = latest.memory_total_bytes - latest.memory_available_bytes
    _say(f"CPU {latest.cpu_percent:.0f} %, memory {_size(used)} of {_size(latest.memory_total_bytes)}{warmth}")
    if latest.board is not None:
        _board(latest.board)
    for model, view in latest.models.items():
        latency = ", ".join(f"{name} {value:.2f} ms" for name, value in sorted(view.latency_ms.items()))
        _say(f"{model}: {view.inferences_total} inferences, {view.errors_total} errors; {latency or 'no calls'}")
        if view.figures:
            _say("  " + ", ".join(f"{name} {value:.6g}" for name, value in sorted(view.figures.items())))


def _board(told: Any) -> None:
    load = [] if told.gpu_percent is None else [f"GPU {told.gpu_percent:.0f} %"]
    mode = [] if told.power_mode is None else [f"mode {told.power_mode}"]
    power = [f"{rail} {value / 1000:.1f} W" for rail, value in told.power_mw.items()]
    warmth = [f"{zone} {value:.0f} °C" for zone, value in told.temperatures_c.items()]
    _say(", ".join([*load, *mode, *power, *warmth]))


@device.command("latencies")
@click.option("--target", help="Only of devices of this target.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write JSON to this file.")
@_state
@_json
def device_latencies(target: str | None, output: Path | None, state: Path | None, as_json: bool) -> None:
    """Show what a call of each bundle took on the devices that proved it; -o is for `kedge compile --latencies`."""
    with FleetService(state) as fleet:
        found = fleet.latencies(target)
    if output is not None:
        try:
            output.write_text(json.dumps(codec.unstructure(found), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(output)) from error
    if as_json:
        _echo_json(found)
        return
    rows = [
        (one.device, one.target, one.bundle[7:19], f"{one.p50_ms:.3f}", f"{one.p95_ms:.3f}", str(one.calls))
        for one in found.measurements
    ]
    table(("device", "target", "bundle", "p50 ms", "p95 ms", "calls"), rows)


@device.command("remove")
@click.argument("name")
@_state
def device_remove(name: str, state: Path | None) -> None:
    """Forget the device NAME. What it serves it goes on serving."""
    with FleetService(state) as fleet:
        fleet.device_remove(name)
    click.echo(f"removed {name}")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@_state
@_json
def publish(out: Path, state: Path | None, as_json: bool) -> None:
    """Hand the release in the folder OUT to the controller."""
    with FleetService(state) as fleet:
        done = fleet.publish(out)
    name = f"{done.release.name}:{done.release.version}"
    what = f"{done.blobs_added} new blobs, {_size(done.bytes_added)}" if done.new else "it was there already"
    _print(done, as_json, f"published {name} for {', '.join(b.target for b in done.release.bundles)} ({what})")


@click.group()
def rollout() -> None:
    """Bring a release to devices."""


@rollout.command("start")
@click.argument("release", metavar="NAME:VERSION")
@_select
@_state
@_json
def rollout_start(release: str, select: dict[str, str], state: Path | None, as_json: bool) -> None:
    """Bring NAME:VERSION to all selected devices at once."""
    with FleetService(state) as fleet:
        started = fleet.rollout_start(release, select)
    for name, reason in started.skipped.items():
        click.echo(f"left out {name}: {reason}", err=True)
    count = len(started.rollout.devices)
    _print(started, as_json, f"rollout {started.rollout.id}: {release} to {count} device{'s' if count != 1 else ''}")


@rollout.command("status")
@click.argument("number", type=int, required=False)
@click.option("--wait", type=click.FloatRange(min=0), default=0.0, metavar="SECONDS", help="Wait until it is decided.")
@_state
@_json
def rollout_status(number: int | None, wait: float, state: Path | None, as_json: bool) -> int:
    """Show where each device stands in rollout NUMBER, or the latest. With --wait, the exit status is 1 unless all are
    done."""
    with FleetService(state) as fleet:
        status = fleet.rollout_status(number, wait=wait)
    if as_json:
        _echo_json(status)
    else:
        _show_rollout(status)
    return 1 if wait and not status.done else 0


@rollout.command("revert")
@click.argument("number", type=int, required=False)
@_state
@_json
def rollout_revert(number: int | None, state: Path | None, as_json: bool) -> None:
    """Bring back what each device was to have before rollout NUMBER, or the latest."""
    with FleetService(state) as fleet:
        status = fleet.rollout_revert(number)
    _print(status, as_json, f"rollout {status.id}: {status.model} back to {status.version}")


def _show_rollout(status: RolloutStatus) -> None:
    state = "done" if status.done else status.state
    click.echo(f"rollout {status.id}: {status.model}:{status.version} ({status.kind}, {state})")
    rows = []
    for one in status.devices:
        progress = one.progress.value
        if one.progress is Progress.FETCHING and one.blocks_total:
            progress = f"{progress} {one.blocks_done}/{one.blocks_total}"
        digests = [digest[7:19] if digest else "none" for digest in (one.digest, one.serving)]
        rows.append((one.device, one.target, progress, *digests, _size(one.bytes_sent), one.detail))
    table(("device", "target", "progress", "wanted", "serves", "pulled", "detail"), rows)


def _labels(labels: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items())) or "-"


def _presence(one: DeviceView) -> str:
    if one.online:
        return "online"
    return f"away, seen {_ago(time.time() - one.seen_at)} ago" if one.seen_at else "never seen"


def _serving(one: DeviceView) -> str:
    if one.reported is None:
        return "-"
    views = one.reported.models.items()
    return ", ".join(f"{name}:{view.version or '?'}" for name, view in views if view.digest) or "nothing"


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _print(value: Any, as_json: bool, line: str) -> None:
    if as_json:
        _echo_json(value)
    else:
        click.echo(line)


def _say(line: str) -> None:
    """Print what devices said, in part: their text must not steer the terminal."""
    click.echo(printable(line))


def _echo_json(value: Any) -> None:
    click.echo(json.dumps(codec.unstructure(value), indent=2))

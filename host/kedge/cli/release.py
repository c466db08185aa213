"""``kedge publish`` and ``kedge release``."""

from __future__ import annotations

import time
from pathlib import Path

import click

from kedge.cli.fleet import json_option, show, show_json, state_option
from kedge.cli.groups import Group
from kedge.cli.table import table
from kedge.fleet.service import FleetService
from kedge.fleet.units import size_text, span_text


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--release-key",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Key that signs the release [default: the one in the state folder, made on first use].",
)
@state_option
@json_option
def publish(out: Path, release_key: Path | None, state: Path | None, as_json: bool) -> None:
    """Publish the release in the folder OUT to the controller."""
    with FleetService(state) as fleet:
        done = fleet.publish(out, release_key=release_key)
    name = f"{done.release.name}:{done.release.version}"
    what = f"{done.blobs_added} new blobs, {size_text(done.bytes_added)}" if done.new else "it was there already"
    targets: dict[str, list[str]] = {}
    for bundle in done.release.bundles:
        targets.setdefault(bundle.target, []).append(bundle.backend)
    told = (target if not several[1:] else f"{target} ({', '.join(several)})" for target, several in targets.items())
    show(done, as_json, f"published {name} for {', '.join(told)} ({what})")


@click.group(cls=Group)
def release() -> None:
    """Manage the published releases."""


@release.command("list")
@state_option
@json_option
def release_list(state: Path | None, as_json: bool) -> None:
    """List the published releases, oldest first."""
    with FleetService(state) as fleet:
        found = fleet.releases()
    if as_json:
        show_json(found)
        return
    rows = [
        (
            f"{one.name}:{one.version}",
            span_text(time.time() - one.published_at) + " ago",
            bundle.target,
            bundle.backend,
            bundle.precision,
            size_text(bundle.total_bytes),
            bundle.digest[7:19],
        )
        for one in found
        for bundle in one.bundles
    ]
    table(("release", "published", "target", "backend", "precision", "size", "bundle"), rows)


@release.command("remove")
@click.argument("release", metavar="NAME:VERSION")
@state_option
@json_option
def release_remove(release: str, state: Path | None, as_json: bool) -> None:
    """Remove the release NAME:VERSION and delete the blobs that no other release needs. Refused while it is the desired
    release of a device."""
    with FleetService(state) as fleet:
        done = fleet.release_remove(release)
    freed = f"{done.blobs_removed} blobs, {size_text(done.bytes_removed)}"
    show(done, as_json, f"removed {release} ({freed} freed)")

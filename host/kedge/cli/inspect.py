"""``kedge inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Bundle, Layout


@click.command("inspect")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--target", help="Show only this target's bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the configuration blob as JSON for programs.")
def inspect_command(out: Path, target: str | None, as_json: bool) -> None:
    """Show the release in OUT: the files, digests and complete configuration of each bundle."""
    layout = Layout(out)
    release = layout.release()
    names = [target] if target is not None else sorted(release.candidates)
    # A target's first bundle has the target's name; those of its other backends say whose they are.
    bundles = {
        name if not place else f"{name} by {bundle.config.backend}": bundle
        for name in names
        for place, bundle in enumerate(layout.candidates(name))
    }
    if as_json:
        click.echo(json.dumps({name: json.loads(bundle.config_raw) for name, bundle in bundles.items()}, indent=2))
        return
    click.echo(f"release {release.name} {release.version}  {release.digest}")
    for name, bundle in bundles.items():
        click.echo(f"\nbundle {name}  {bundle.digest}")
        _files(bundle)
        # From the bytes, not from the view: what a newer Kedge wrote is shown too.
        _tree(json.loads(bundle.config_raw), depth=1)


def _files(bundle: Bundle) -> None:
    click.echo("  files")
    for layer in bundle.manifest.layers:
        kind = "golden" if layer.media_type == oci.GOLDEN_TYPE else "model"
        click.echo(f"    {layer.title}  {kind}  {layer.size} bytes  {layer.digest}")
    config = bundle.manifest.config
    click.echo(f"    (configuration)  {config.size} bytes  {config.digest}")


def _tree(value: Any, *, depth: int) -> None:
    """Yield nested data, one line per leaf."""
    pad = "  " * depth
    for key, item in value.items():
        if isinstance(item, dict) and item:
            click.echo(f"{pad}{key}")
            _tree(item, depth=depth + 1)
        elif isinstance(item, list) and item and isinstance(item[0], dict):
            for number, entry in enumerate(item):
                click.echo(f"{pad}{key} {number}")
                _tree(entry, depth=depth + 1)
        else:
            click.echo(f"{pad}{key}  {_leaf(item)}")


def _leaf(item: Any) -> str:
    if isinstance(item, list):
        return ", ".join(map(_leaf, item)) or "none"
    if item is None:
        return "any"
    return str(item) if not isinstance(item, dict) else "none"

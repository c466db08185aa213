"""``kedge target``."""

from __future__ import annotations

import json

import click

from kedge.cli.groups import Group
from kedge_protocol import codec
from kedge_targets.target_survey import BackendView, survey

_WORDS = {
    "executed": "run by the device's own runtime",
    "simulated": "run by a bit-exact simulator",
    "compiled": "the vendor's compiler makes the device's file",
    "checked": "the vendor's parser accepts it",
}
"""The values of ``Verified`` in words."""


@click.group(cls=Group)
def target() -> None:
    """List the supported targets."""


@target.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def list_targets(as_json: bool) -> None:
    """List every target: its backends in order, their precisions, how far this host can verify a bundle, and what is
    missing."""
    found = survey()
    if as_json:
        click.echo(json.dumps(codec.unstructure(found), indent=2))
        return
    from kedge.cli.table import table

    rows = [
        (one.name, one.architecture, backend.name, " ".join(backend.precisions), _proof(backend), one.title)
        for one in found
        for backend in one.backends
    ]
    table(("target", "processor", "backend", "precisions", "proof here", "device"), rows)
    shown = {backend.verification.value for one in found for backend in one.backends}
    click.echo()
    for word in (word for word in _WORDS if word in shown):
        click.echo(f"{word}: {_WORDS[word]}")
    missing = {backend.name: backend.missing for one in found for backend in one.backends if backend.missing}
    for name, what in sorted(missing.items()):
        click.echo(f"{name} lacks: {what}")


def _proof(backend: BackendView) -> str:
    return backend.verification.value if backend.here else f"none yet ({backend.verification.value})"

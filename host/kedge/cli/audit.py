"""``kedge audit``."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from kedge.cli.fleet import MAX_ROWS, json_option, show_json, state_option
from kedge.cli.groups import Group
from kedge.cli.table import table
from kedge.fleet.service import FleetService
from kedge.fleet.units import span_text


@click.group(cls=Group)
def audit() -> None:
    """Show and check the audit log: who did what to the fleet, when, and on what evidence."""


@audit.command("list")
@click.option("--limit", type=click.IntRange(1, MAX_ROWS), default=50, show_default=True, help="Number of entries.")
@click.option("--subject", help="Only entries of this subject, such as 'rollout 7' or a device's name.")
@state_option
@json_option
def audit_list(limit: int, subject: str | None, state: Path | None, as_json: bool) -> None:
    """List the entries of the audit log, newest first."""
    with FleetService(state) as fleet:
        found = fleet.audit_log(limit=limit, subject=subject)
    if as_json:
        show_json(found)
        return
    rows = [
        (
            str(one.number),
            span_text(time.time() - one.at) + " ago",
            one.actor,
            one.action,
            one.subject,
            one.hash[:12],
            json.dumps(one.evidence, ensure_ascii=False),
        )
        for one in found
    ]
    table(("entry", "when", "who", "action", "subject", "hash", "evidence"), rows)


@audit.command("verify")
@click.option("--expect", metavar="HASH", help="A hash that the log showed earlier; the log must still hold it.")
@state_option
@json_option
def audit_verify(expect: str | None, state: Path | None, as_json: bool) -> None:
    """Check that no entry of the audit log was changed or taken out, and print the hash of its newest entry. Keep that
    hash elsewhere: with --expect it shows later whether the end of the log was cut off."""
    with FleetService(state) as fleet:
        head = fleet.audit_verify(expect=expect)
    if as_json:
        show_json({"head": head})
    else:
        click.echo(head)

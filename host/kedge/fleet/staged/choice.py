"""Finds the devices that a policy selects, and plans their waves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence

from kedge.fleet import devices, rollouts
from kedge.fleet.database import Row, Session
from kedge.fleet.rollouts import Selection
from kedge.fleet.staged import selectors, waves
from kedge.fleet.staged.policy import Policy
from kedge.fleet.staged.selectors import Properties, Selector
from kedge.fleet.staged.waves import WavePlan
from kedge_protocol import codec
from kedge_protocol.errors import FleetError, MessageError
from kedge_protocol.messages import Reported

_NEWER = """
SELECT device_id FROM rollout_device JOIN rollout ON rollout.id = rollout_id WHERE model = :model AND rollout.id > :id
UNION SELECT device_id FROM rollout_member JOIN rollout ON rollout.id = rollout_id
WHERE model = :model AND rollout.id > :id
"""


def with_labels(policy_select: str, labels: Mapping[str, str]) -> str:
    """Return a selector that asks for these labels too."""
    terms = [f"label.{key}={value}" if selectors.is_fact(key) else f"{key}={value}" for key, value in labels.items()]
    return ",".join([*terms, policy_select] if policy_select.strip() else terms)


def choose(session: Session, policy: Policy) -> list[Row]:
    """Return the selected devices, by name.

    Raises:
        FleetError: none is selected, a device of the list does not exist, or no device has a label that is asked for.
    """
    selector = selectors.parse(policy.select)
    rows = _candidates(session, selector)
    found = {row["name"]: row for row in rows}
    if missing := [name for name in policy.devices if name not in found]:
        raise FleetError(
            f"there is no device {missing[0]!r}"
            + (f", nor {len(missing) - 1} more of the list" if missing[1:] else ""),
            remedy="See kedge device list",
        )
    known = {row["name"]: _properties(row) for row in rows}
    selector.check_keys(known.values())
    chosen = [row for row in _listed(policy, rows) if selector.matches(known[row["name"]])]
    if not chosen:
        raise FleetError(
            f"the selector {policy.select!r} selects no device" if policy.select else "there is no device",
            remedy="See kedge device list",
        )
    return chosen


def newcomers(session: Session, policy: Policy, rollout: Row, members: Mapping[int, object]) -> dict[int, str]:
    """Return the devices (number → target) that a rollout would select now, has not, and that no newer one has."""
    selector = selectors.parse(policy.select)
    model = {"model": rollout["model"], "id": rollout["id"]}
    newer = {row["device_id"] for row in session.rows(_NEWER, model)}
    release = session.value(
        "SELECT id FROM release WHERE name = ? AND version = ?", (rollout["model"], rollout["version"])
    )
    bundles = rollouts.bundles_of(session, release) if release is not None else {}
    return {
        row["id"]: row["target"]
        for row in _listed(policy, _candidates(session, selector))
        if row["id"] not in members
        and row["id"] not in newer
        and row["target"] in bundles
        and selector.matches(_properties(row))
    }


def plan(policy: Policy, selection: Selection, names: Mapping[int, str]) -> WavePlan:
    """Plan the waves of the selected devices."""
    devices_of = {names[number]: target for number, target in selection.targets.items()}
    return waves.plan(devices_of, policy.sizes, min_per_target=policy.min_per_target, seed=policy.seed)


def _candidates(session: Session, selector: Selector) -> list[Row]:
    return devices.select_devices(session, {}, extra="reported" if selector.asks_reports else "NULL")


def _listed(policy: Policy, rows: Sequence[Row]) -> list[Row]:
    listed = set(policy.devices)
    return [row for row in rows if row["name"] in listed] if listed else list(rows)


def _properties(row: Row) -> Properties:
    facts = {"target": row["target"], "online": "yes" if row["online"] else "no"}
    if row[8] is not None:
        # One that this Kedge cannot read is an old one: the next report tells.
        with contextlib.suppress(MessageError):
            facts |= _reported(codec.decode(row[8], Reported, where=f"report of {row['name']}"))
    return Properties(name=row["name"], labels=json.loads(row["labels"]), facts=facts)


def _reported(reported: Reported) -> dict[str, str]:
    models = {f"serves.{name}": model.version or "" for name, model in reported.models.items() if model.digest}
    return {
        "agent": reported.agent_version,
        "architecture": reported.architecture,
        "python": reported.python,
        "free_mib": str(reported.free_bytes >> 20),
        **{f"runtime.{name}": version for name, version in reported.runtimes.items()},
        **models,
    }

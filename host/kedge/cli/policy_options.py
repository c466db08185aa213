"""The options of ``kedge rollout start`` that make its policy."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import click

from kedge.fleet.staged.policy import Policy

F = TypeVar("F", bound=Callable[..., Any])

_LABEL = re.compile(r"([A-Za-z0-9][A-Za-z0-9._\-]*)=([A-Za-z0-9][A-Za-z0-9._\-]*)")
_DEFAULTS = Policy()

_TEXTS = {
    "waves": ("SIZES", "How far each wave reaches: percentages, or numbers of devices."),
    "soak": ("SPAN", "How long the gates watch each wave."),
    "max_soak": ("SPAN", "How long they watch it at most if they cannot decide; by default four times --soak."),
    "progress_timeout": ("SPAN", "Time without progress after which a device counts as silent."),
    "deadline": ("SPAN", "Time after which a device that was told and does not serve yet counts as silent."),
    "retry_after": ("SPAN", "Time from a device's failure to its next try."),
    "not_before": ("TIME", "Begin no earlier than this time, such as 2026-12-01T22:00+01:00."),
    "seed": ("TEXT", "Text that decides which devices are in the first wave; another one chooses others."),
}
_NUMBERS = {
    "min_per_target": "Smallest number of devices of each target in each wave.",
    "parallel": "Largest number of devices that are updated at the same time; 0 for no limit.",
    "per_minute": "Largest number of devices that are told within a minute; 0 for no limit.",
    "shadow_memory_mib": "Largest memory, in MiB, of a shadow on a device.",
    "retries": "How often a device that failed is told again.",
}
_CHOICES = {
    "approval": "After which waves a person must promote.",
    "undecided": "What to do if the gates cannot decide.",
    "on_abort": "What to do with the devices that an aborted rollout has reached.",
    "late": "Whether devices that meet the selector later are taken in.",
    "busy": "What to do if another rollout has some of the devices: replace it there, or wait for it.",
}


def policy_options(command: F) -> F:
    """Add the options of a policy."""
    for name, text in reversed(_NUMBERS.items()):
        command = click.option(_flag(name), name, type=int, metavar="N", help=text + _default(name))(command)
    for name, text in reversed(_CHOICES.items()):
        choices = click.Choice([one.value for one in type(getattr(_DEFAULTS, name))])
        command = click.option(_flag(name), name, type=choices, help=text + _default(name))(command)
    for name, (metavar, text) in reversed(_TEXTS.items()):
        command = click.option(_flag(name), name, metavar=metavar, help=text + _default(name))(command)
    command = click.option(
        "--shadow",
        type=float,
        metavar="SHARE",
        help="Run the new bundle beside the old one first, on the first wave's devices, with this share of a core.",
    )(command)
    listed = click.option(
        "--devices",
        "device_list",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Only the devices in this file, one name on each line.",
    )
    gate = click.option(
        "--gate",
        "gates",
        multiple=True,
        metavar="NAME=LIMIT",
        help="Limit of a gate, such as error_rate=0.02; NAME=off turns it off. Repeat for several gates.",
    )
    window = click.option(
        "--window",
        metavar="HOURS",
        help="Tell devices only within these hours, such as 22:00-05:00; days and time zone may follow:"
        " '22:00-05:00 fri,sat Europe/Berlin'.",
    )
    file = click.option(
        "--policy",
        "policy_file",
        type=click.Path(path_type=Path),
        help="TOML file with the policy; the options below override it.",
    )
    return file(gate(window(listed(command))))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _default(name: str) -> str:
    """Return what stands for the policy's default at the end of a help text; nothing for 0 and for no text."""
    value = getattr(_DEFAULTS, name)
    if isinstance(value, enum.Enum):
        text = value.value
    elif isinstance(value, tuple):
        text = ",".join(value)
    elif isinstance(value, float):
        hours, rest = divmod(value, 3600)
        text = f"{hours:g}h" if hours and not rest else f"{value / 60:g}m"
    else:
        text = str(value)
    return f" [default: {text}]" if value else ""


def split_selectors(select: tuple[str, ...]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the labels among selectors, and the other selectors."""
    from kedge.fleet.staged.selectors import is_fact

    labels, others = {}, []
    for text in select:
        found = _LABEL.fullmatch(text.strip())
        if found and not is_fact(found[1]):
            labels[found[1]] = found[2]
        else:
            others.append(text)
    return labels, tuple(others)


def parse_policy(policy_file: Path | None, select: tuple[str, ...], given: dict[str, Any]) -> Any:
    """Return the policy of a command line, or None where nothing of one was given.

    Args:
        select: selectors, all of which must hold.
        given: click's values of :func:`policy_options`.

    Raises:
        ConfigError: it does not fit.
    """
    from kedge.fleet.staged import policy as policies

    changed = {name: value for name, value in given.items() if value is not None and value != ()}
    if policy_file is None and not changed and not select:
        return None
    document = _document(changed)
    if policy_file is None:
        # Without a policy all devices are told at once; a selector alone does not make waves.
        whole = {} if changed else {"waves": ["100%"], "soak": 0.0}
        found = policies.parse(whole | document, where="the options")
    else:
        found = policies.read(policy_file, **document)
    terms = [one for one in (found.select, *select) if one.strip()]
    return replace(found, select=",".join(terms)).check()


def _document(changed: dict[str, Any]) -> dict[str, Any]:
    document = dict(changed)
    if "waves" in document:
        document["waves"] = [one.strip() for one in document["waves"].split(",")]
    if listed := document.pop("device_list", None):
        try:
            document["devices"] = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise click.BadParameter(f"{listed} cannot be read: {error}", param_hint="--devices") from error
    if "window" in document:
        hours, *others = document["window"].split()
        days = [day for one in others if "/" not in one and one != "UTC" for day in one.split(",")]
        zones = [one for one in others if "/" in one or one == "UTC"]
        document["window"] = {"hours": hours, "days": days, **({"timezone": zones[0]} if zones else {})}
    if "gates" in document:
        document["gates"] = _gates(document["gates"])
    return document


def _gates(texts: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.BadParameter(f"{text!r} is not NAME=LIMIT", param_hint="--gate")
        if value == "off":
            found.setdefault("off", []).append(name)
            continue
        try:
            found[name] = int(value) if value.isdigit() else float(value)
        except ValueError:
            found[name] = value
    return found

"""Pages that are made of the code itself: the typed messages of the protocol, the files that people write.

Nothing here needs the site's generator, so the tests run it in the project's own environment.
"""

from __future__ import annotations

import dataclasses
import enum
import html
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from kedge.cli.main import cli as host_commands
from kedge_agent import config as agent_config
from kedge_agent.cli import cli as agent_commands
from kedge_protocol import blocks, errors, messages, samples, signatures, telemetry, topics, trust
from kedge_protocol.bundle import config as bundle_config
from kedge_targets import target

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`~?([^`]+)`")
_ENTRY = re.compile(r"^ {4}(\w[\w, ]*): (.*)$")
_SHARED = re.compile(r"^(?P<indent> {4,})(?P<names>\w+(?:, \w+)+): (?P<text>.*)$")
_MEMBER = re.compile(r'^\s+\w+ = "?([\w.-]+)"?(?:\s+# (.*))?$')
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "path", bytes: "bytes", Any: "any"}

TOPICS = (
    (topics.desired("{device}"), "yes", "controller to device", "[Envelope](#envelope) around [Desired](#desired)"),
    (topics.reported("{device}"), "yes", "device to controller", "[Reported](#reported)"),
    (topics.status("{device}"), "yes, and as the will", "device to controller", "[Status](#status)"),
    (topics.command("{device}", "{cid}"), "no", "controller to device", "[Command](#command)"),
    (topics.ack("{device}", "{cid}"), "no", "device to controller", "[Ack](#ack)"),
    (topics.request("{device}", "{rid}"), "no", "device to controller", "[BlockRequest](#blockrequest)"),
    (topics.block("{device}", "{rid}"), "no", "controller to device", "[a block](#blocks), binary"),
    (topics.telemetry("{device}", "metrics"), "no", "device to controller", "[Telemetry](#telemetry)"),
    (topics.telemetry("{device}", samples.STREAM), "no", "device to controller", "binary, [SampleChunk](#samplechunk)"),
    (topics.CONTROLLER_STATUS, "yes, and as the will", "controller to devices", "[Status](#status)"),
)
"""Topic, retained, direction, payload."""


def plain(text: str) -> str:
    """A docstring's text as Markdown: roles become code, double backticks single ones."""
    text = _ROLE.sub(r"`\1`", text)
    return re.sub(r"``([^`]+)``", r"`\1`", text).replace("::\n", ":\n")


def one_name_each(text: str) -> str:
    """A docstring in which each parameter has an entry of its own: ``a, b: text`` becomes two entries of one text."""
    lines, found = text.splitlines(), []
    number = 0
    while number < len(lines):
        entry = _SHARED.match(lines[number])
        first, number = number, number + 1
        if entry is None:
            found.append(lines[first])
            continue
        while number < len(lines) and lines[number].startswith(entry["indent"] + " "):
            number += 1
        for name in entry["names"].split(", "):
            found += [f"{entry['indent']}{name}: {entry['text']}", *lines[first + 1 : number]]
    return "\n".join(found)


def described(cls: type) -> tuple[str, dict[str, str]]:
    """The text of a class's docstring, and the text of each field in its section ``Attributes``."""
    text, _, attributes = (inspect.getdoc(cls) or "").partition("\nAttributes:\n")
    found: dict[str, str] = {}
    last: list[str] = []
    for line in attributes.splitlines():
        if entry := _ENTRY.match(line):
            last = [name.strip() for name in entry[1].split(",")]
            found |= dict.fromkeys(last, entry[2])
        elif line.strip():
            found |= {name: f"{found[name]} {line.strip()}" for name in last}
    return plain(text.strip()), {name: plain(told) for name, told in found.items()}


def kind(annotation: Any) -> str:
    """A type in JSON's words; a class is a link to its heading on the same page."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(kind(one) for one in arguments if one is not types.NoneType)
    if origin in (list, tuple):
        return f"list of {kind(arguments[0])}"
    if origin in (dict, Mapping):
        return f"object: {kind(arguments[0])} to {kind(arguments[1])}"
    if annotation in _PLAIN:
        return _PLAIN[annotation]
    if annotation.__module__ == "builtins":
        return str(annotation.__name__)
    return f"[{annotation.__name__}](#{annotation.__name__.lower()})"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        made = field.default_factory()
        return "empty" if not made else "see there"
    if field.default is dataclasses.MISSING:
        return "required"
    value = field.default.value if isinstance(field.default, enum.Enum) else field.default
    if value is None:
        return "absent"
    if value in ("", ()):
        return "empty"
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _code(text: str) -> str:
    """Code in a cell, where Markdown's own would show the escape of a bar."""
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def _sentence(text: str) -> str:
    """What a docstring says of a field, as a sentence."""
    text = text[:1].upper() + text[1:]
    return text if not text or text.endswith(".") else f"{text}."


def table(cls: type[Any]) -> Iterator[str]:
    """The fields of a dataclass: name, type, default, meaning."""
    hints = typing.get_type_hints(cls)
    _, told = described(cls)
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    for field in dataclasses.fields(cls):
        name = field.metadata.get("json", field.name)
        cells = (f"`{name}`", kind(hints[field.name]), _default(field), _sentence(told.get(field.name, "")))
        yield f"| {' | '.join(map(_cell, cells))} |"
    yield ""


def values(cls: type[enum.Enum]) -> Iterator[str]:
    """The values of an enumeration, with the remark beside each in the source."""
    yield "| value | meaning |"
    yield "|---|---|"
    known = {str(member.value) for member in cls}
    for line in inspect.getsource(cls).splitlines():
        if (found := _MEMBER.match(line)) and found[1] in known:
            yield f"| `{found[1]}` | {_cell(_sentence(plain(found[2] or '')))} |"
    yield ""


def section(cls: type[Any], *, level: int = 2, title: str | None = None) -> Iterator[str]:
    """A heading, what the class says of itself, and its table."""
    yield f"{'#' * level} {title or cls.__name__}"
    yield ""
    yield described(cls)[0]
    yield ""
    yield from values(cls) if issubclass(cls, enum.Enum) else table(cls)


def defined(module: types.ModuleType) -> list[type[Any]]:
    """The dataclasses and enumerations that a module defines, in its order."""
    return [
        value
        for name, value in vars(module).items()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and not name.startswith("_")
        and (dataclasses.is_dataclass(value) or issubclass(value, enum.Enum))
    ]


def _classes(annotation: Any) -> Iterator[type[Any]]:
    """The dataclasses and enumerations in a type."""
    if isinstance(annotation, type) and (dataclasses.is_dataclass(annotation) or issubclass(annotation, enum.Enum)):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _classes(argument)


def also_used(known: Iterable[type[Any]]) -> list[type[Any]]:
    """The classes of other modules that fields of these have, and that theirs have, in the order they are met."""
    met = list(known)
    count = len(met)
    for cls in met:
        hints = typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        met += [one for hint in hints.values() for one in dict.fromkeys(_classes(hint)) if one not in met]
    return list(dict.fromkeys(met[count:]))


def protocol() -> str:
    """The page of the protocol."""
    lines = ["# Protocol", "", "This page is generated from `kedge_protocol`. Payloads are JSON unless said otherwise."]
    lines += [f"No message is larger than {blocks.MAX_MESSAGE_BYTES // 1024} KiB. Unknown fields are ignored.", ""]
    lines += [plain(_paragraphs(messages)), "", "## Topics", "", "| topic | retained | direction | payload |"]
    lines += ["|---|---|---|---|", *(f"| `{topic}` | {' | '.join(rest)} |" for topic, *rest in TOPICS), ""]
    lines += ["[Who may read and write what](../fleet.md#who-may-do-what) is the broker's to hold.", ""]
    for cls in defined(messages):
        lines += section(cls)
    for module in (samples, telemetry, signatures, trust):
        for cls in (one for one in defined(module) if dataclasses.is_dataclass(one) or issubclass(one, enum.Enum)):
            lines += section(cls)
    lines += ["## Blocks", "", plain(_paragraphs(blocks)), ""]
    for cls in defined(blocks):
        lines += section(cls, level=3)
    lines += ["## The configuration of a bundle", "", plain(_paragraphs(bundle_config)), ""]
    configuration = defined(bundle_config)
    for cls in [*configuration, *also_used(configuration)]:
        lines += section(cls, level=3)
    return "\n".join(lines) + "\n"


def _paragraphs(module: types.ModuleType) -> str:
    return (inspect.getdoc(module) or "").strip()


def files() -> str:
    """The page of the files that people write."""
    lines = ["# Configuration files", "", "This page is generated from the classes that read these files. Unknown keys"]
    lines += ["are errors; the message names the key.", "", "## agent.toml", ""]
    lines += ["`kedge-agent run --config agent.toml` reads it. Relative paths begin at the file's folder.", ""]
    for cls in (one for one in defined(agent_config) if one.__name__.endswith("Table")):
        name = cls.__name__.removesuffix("Table").lower()
        lines += section(cls, level=3, title=f"[{name}]")
    lines += ["## Target files", "", "`kedge compile --target ./board.toml` and `[device] target` read it; see"]
    lines += ["[Targets](../targets.md).", ""]
    for cls in (target.Target, target.Processor, target.System, target.BackendChoice):
        lines += section(cls, level=3)
    return "\n".join(lines) + "\n"


def commands() -> str:
    """The page of both command lines; what it says is what ``--help`` says."""
    lines = ["# Commands", "", "This page is generated from the commands themselves; `--help` says the same.", ""]
    for program, group in (("kedge", host_commands), ("kedge-agent", agent_commands)):
        lines += _command(group, click.Context(group, info_name=program), 2)
    return "\n".join(lines) + "\n"


def _command(command: click.Command, context: click.Context, level: int) -> Iterator[str]:
    yield from (f"{'#' * level} {context.command_path}", "", inspect.cleandoc(command.help or ""), "")
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                yield from _command(inner, click.Context(inner, parent=context, info_name=name), 3)
        return
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    yield from ("```text", usage, "```", "", "| option | |", "|---|---|")
    for option in command.get_params(context):
        record = option.get_help_record(context)
        if record is not None and record[1]:
            yield f"| {_code(record[0])} | {_cell(html.escape(record[1], quote=False))} |"
    yield ""


def api(public: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Page → its text, which mkdocstrings fills from the docstrings.

    Args:
        public: import path → its exported names.
    """
    pages = {
        "reference/api/errors.md": f"# Errors\n\n::: {errors.__name__}\n    options:\n      show_root_heading: false\n"
    }
    for path, names in public.items():
        module = importlib.import_module(path)
        lines = [f"# {path}", "", plain(_paragraphs(module)), ""]
        exported = {name: getattr(module, name) for name in names}
        raised = [name for name, value in exported.items() if getattr(value, "__module__", "") == errors.__name__]
        for name, value in exported.items():
            if name in raised or inspect.ismodule(value):
                continue
            is_documented = inspect.isclass(value) or inspect.isfunction(value)
            lines += [
                f"::: {value.__module__}.{value.__qualname__}" if is_documented else f"`{name}` is `{value!r}`.",
                "",
            ]
        if raised:
            links = ", ".join(f"[`{name}`](errors.md#{errors.__name__}.{name})" for name in raised)
            lines += ["## Errors", "", f"This module exports {links}.", ""]
        pages[f"reference/api/{path}.md"] = "\n".join(lines)
    return pages

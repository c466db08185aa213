"""The setup kit of one device: the files for its board, with its name, broker and credentials filled in."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kedge.fleet import agent_wheel
from kedge.fleet.options import KitOptions
from kedge_protocol import codec, credentials, files, toml
from kedge_protocol.broker import parse_broker
from kedge_protocol.errors import ConfigError, StorageError
from kedge_protocol.topics import checked_name
from kedge_protocol.trust import Trust
from kedge_targets import firmware
from kedge_targets import target as targets

__all__ = ["KitOptions", "Member", "archive", "fill_template", "members", "write"]

_AGENT = "etc/kedge/agent.toml"
_CA, _CERT, _KEY, _PASSWORD = "ca.pem", "cert.pem", "key.pem", "password"
_BOARD = "board.toml"
_TRUST = "trust.json"
_EXAMPLE = "mqtts://broker.example:8883"
_TABLE = re.compile(r"\[([a-z]+)\]\s*")
_LINE = re.compile(r"([a-z_]+) = (\"[^\"\\]*\")( *)(#.*)?")


@dataclass(frozen=True)
class Member:
    """One file of a kit."""

    content: bytes
    mode: int


def write(name: str, target: str, options: KitOptions, trust: Trust | None = None) -> None:
    """Write the kit of a device to ``options.kit``, a .tar.gz that only its owner may read; an existing file is
    replaced.

    The same device with the same options gives the same bytes. Paths within are those at which files are installed;
    ``README.md``, ``install.sh``, ``packages/`` and ``wheels/`` lie beside. Passwords and keys have mode 0600.

    Args:
        name: of the device.
        target: a known target's name or the path of a ``.toml`` file.
        trust: the keys that the device shall trust; None for a device that takes unsigned desired states.

    Raises:
        ConfigError: a name, address or credential that cannot be used, or no kit was asked for.
        TargetError: unknown target, or one that nothing makes ready.
        StorageError: the file cannot be written.
        MissingDependencyError: the agent's distribution is not installed here.
    """
    if options.kit is None:
        raise ConfigError("no file was given for the kit", remedy="Give --kit OUT.tar.gz")
    packed = archive(members(name, target, options, trust))
    try:
        files.write(options.kit, packed, mode=0o600)
    except OSError as error:
        raise StorageError(f"the kit cannot be written: {error.strerror}", where=str(options.kit)) from error


def members(name: str, target: str, options: KitOptions, trust: Trust | None = None) -> dict[str, Member]:
    """Return path → file of a kit; see :func:`write`."""
    checked_name(name, "device name")
    found = targets.find(target)
    own = target.endswith(".toml")
    sources = firmware.files(options.like or found.name)
    made = {path: _member(source.read_bytes()) for path, source in sources.items()}
    settings = made.pop("agent.toml").content.decode()
    readme = made.pop("README.md").content.decode()
    values, credentials = _broker(name, options)
    values |= {"device.name": name, "device.target": f"./{_BOARD}" if own else found.name}
    if trust is not None:
        values["trust.file"] = _TRUST
        made[f"etc/kedge/{_TRUST}"] = _member(codec.encode(trust))
    if own:
        made[f"etc/kedge/{_BOARD}"] = _member(Path(target).read_bytes())
    made[_AGENT] = _member(fill_template(settings, values).encode())
    made |= _own_package()
    made["README.md"] = _member((_heading(name, found.name, options) + readme).encode())
    return dict(sorted((made | credentials).items()))


def _own_package() -> dict[str, Member]:
    """Return the agent's wheel and the requirement line that makes pip take exactly this wheel."""
    name, content = agent_wheel.build()
    line = f"./wheels/{name} --hash=sha256:{hashlib.sha256(content).hexdigest()}\n"
    return {f"wheels/{name}": _member(content), "packages/kedge.txt": _member(line.encode())}


def archive(files: Mapping[str, Member]) -> bytes:
    """Pack a .tar.gz without timestamps, owned by root."""
    folders = {str(parent) for path in files for parent in Path(path).parents} - {"."}
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folders | set(files)):
            entry = tarfile.TarInfo(path)
            entry.uname = entry.gname = "root"
            if path in folders:
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(entry)
            else:
                entry.size, entry.mode = len(files[path].content), files[path].mode
                tar.addfile(entry, io.BytesIO(files[path].content))
    return gzip.compress(raw.getvalue(), compresslevel=9, mtime=0)


def fill_template(text: str, values: Mapping[str, str | None]) -> str:
    """Fill these values into a board's ``agent.toml`` in place of its examples; comments stay.

    Args:
        text: one line a value; texts without escapes.
        values: ``table.key`` → text; None takes the line out.

    Raises:
        ConfigError: a table that the file has not.
    """
    left = {key: value for key, value in values.items() if value is not None}
    lines: list[str] = []
    table, end = "", {}
    for line in text.splitlines():
        if header := _TABLE.fullmatch(line):
            table = header[1]
            end[table] = len(lines)
        key = f"{table}.{found[1]}" if (found := _LINE.fullmatch(line)) else None
        if found is not None and key in values:
            if key not in left:
                continue
            line = f"{found[1]} = {_quoted(left.pop(key))}"
            line = f"{line:<{found.start(4)}}{found[4]}" if found[4] else line
        if line.strip():
            end[table] = len(lines)
        lines.append(line)
    for key, value in sorted(left.items(), reverse=True):
        table, _, name = key.partition(".")
        if table not in end:
            raise ConfigError(f"the board's agent.toml has no table [{table}]")
        lines.insert(end[table] + 1, f"{name} = {_quoted(value)}")
        end = {other: at + (at > end[table]) for other, at in end.items()}
    made = "\n".join(lines) + "\n"
    read = toml.loads(made)
    for key, wanted in values.items():
        table, _, name = key.partition(".")
        if read[table].get(name) != wanted:
            raise ConfigError(f"{wanted!r} cannot be written as {key}", remedy="Use letters, digits and usual signs")
    return made


def _quoted(text: str) -> str:
    """Return a basic string of TOML 1.0; control characters are refused."""
    if not text.isprintable():
        raise ConfigError(f"{text!r} holds characters that cannot be printed")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _member(content: bytes) -> Member:
    return Member(content, 0o755 if content.startswith(b"#!") else 0o644)


def _broker(name: str, options: KitOptions) -> tuple[dict[str, str | None], dict[str, Member]]:
    """Return the values of ``[broker]`` and the files that they name, checked as the agent checks them."""
    password = None if options.password_file is None else credentials.read_password(options.password_file)
    username = options.username or (name if password is not None else None)
    parse_broker(
        options.broker or _EXAMPLE,
        ca=options.ca,
        cert=options.cert,
        key=options.key,
        username=username,
        password=password,
    )
    files = {
        _CA: Member(credentials.read(options.ca), 0o644) if options.ca else None,
        # It may hold the key too.
        _CERT: Member(credentials.read(options.cert), 0o600) if options.cert else None,
        _KEY: Member(credentials.read(options.key), 0o600) if options.key else None,
        _PASSWORD: Member(f"{password}\n".encode(), 0o600) if password is not None else None,
    }
    values: dict[str, str | None] = {
        "broker.url": options.broker or _EXAMPLE,
        "broker.ca": _CA if options.ca else None,
        "broker.cert": _CERT if options.cert else None,
        "broker.key": _KEY if options.key else None,
        "broker.username": username,
        "broker.password_file": _PASSWORD if password is not None else None,
    }
    return values, {f"etc/kedge/{title}": file for title, file in files.items() if file is not None}


def _heading(name: str, target: str, options: KitOptions) -> str:
    broker = options.broker or f"{_EXAMPLE}, an example: fill in `url` in `{_AGENT}`"
    return (
        f"<!-- The kit of device {name}. It may hold its password or key: hand it on with care. -->\n\n"
        f"**{name}**, target `{target}`, broker {broker}.\n\n"
        "On the board: `tar -xzf` this kit into an empty folder, then `sudo sh install.sh` in it.\n\n"
    )

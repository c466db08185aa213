"""Devices in the database: adding, editing, selecting, viewing, removing."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence

from kedge.fleet import schema
from kedge.fleet.database import Row, Session, note_change
from kedge.fleet.results import DeviceRow, DeviceView, Measurement, TransferView
from kedge_protocol import codec
from kedge_protocol.errors import ConfigError, FleetError
from kedge_protocol.messages import MAX_SOAK, Desired, Reported, Shadow, Telemetry
from kedge_protocol.samples import Choice, SampleRequest
from kedge_protocol.topics import checked_name

TELEMETRY_SHOWN = 60
"""Number of telemetry messages shown for a device; at least as many are kept."""

_DEVICES = """
SELECT device.id, name, target, labels, desired_version, online, seen_at, told_target, {extra}
FROM device LEFT JOIN device_state ON device_state.device_id = device.id
WHERE NOT removed {condition} ORDER BY name
"""


def check_new(session: Session, name: str, target: str, labels: Mapping[str, str]) -> str:
    """The name of the target, if such a device can be added; see
    :meth:`kedge.fleet.service.FleetService.device_add` for what it raises."""
    from kedge_targets import target as targets

    checked_name(name, "device name")
    _check_labels(labels)
    found = targets.find(target)
    known = session.row("SELECT target FROM device WHERE name = ? AND NOT removed", (name,))
    if known is not None:
        raise FleetError(
            f"there is a device {name!r} already (target {known['target']})",
            remedy=f"Choose another name, or remove it first: kedge device remove {name}",
        )
    return found.name


def add(session: Session, name: str, target: str, labels: Mapping[str, str]) -> int:
    """Add a device and return its number; see :meth:`kedge.fleet.service.FleetService.device_add`."""
    return insert(session, name, check_new(session, name, target, labels), labels)


def insert(session: Session, name: str, target: str, labels: Mapping[str, str]) -> int:
    """Add a device that :func:`check_new` has looked at and return its number.

    Args:
        target: the target's name, as that function returned it.
    """
    values = (target, json.dumps(dict(labels)), session.now(), name)
    note_change(session)
    # The row of a removed device of this name goes on: its desired version must never fall.
    if session.run("UPDATE device SET target = ?, labels = ?, added_at = ?, removed = 0 WHERE name = ?", values) == 0:
        session.run(
            "INSERT INTO device (target, labels, added_at, name, desired_version, managed, removed)"
            " VALUES (?, ?, ?, ?, 0, 0, 0)",
            values,
        )
    return find(session, name)


def _check_labels(labels: Mapping[str, str]) -> None:
    for key, value in labels.items():
        checked_name(key, "label")
        checked_name(value, f"value of the label {key}")


def edit(session: Session, name: str, labels: Mapping[str, str], without: Collection[str]) -> None:
    """See :meth:`kedge.fleet.service.FleetService.device_edit`."""
    _check_labels(labels)
    number = find(session, name)
    now = json.loads(session.value("SELECT labels FROM device WHERE id = ?", (number,)))
    if missing := [key for key in without if key not in now]:
        raise ConfigError(f"{name} has no label {missing[0]!r}", remedy=f"It has: {', '.join(sorted(now)) or 'none'}")
    if both := sorted(labels.keys() & set(without)):
        raise ConfigError(f"the label {both[0]!r} is to be set and to be removed")
    kept = {key: value for key, value in now.items() if key not in without}
    session.run("UPDATE device SET labels = ? WHERE id = ?", (json.dumps(kept | dict(labels)), number))


def find(session: Session, name: str) -> int:
    """Return the number of the device with this name.

    Raises:
        FleetError: there is none; the message names those there are.
    """
    number = session.value("SELECT id FROM device WHERE name = ? AND NOT removed", (name,))
    if number is None:
        there = [
            row["name"] for row in session.rows("SELECT name FROM device WHERE NOT removed ORDER BY name LIMIT 11")
        ]
        shown = ", ".join(there[:10]) + (", …" if len(there) > 10 else "")
        raise FleetError(f"there is no device {name!r}", remedy=f"Known are: {shown or 'none'}; see kedge device add")
    return int(number)


def select_devices(session: Session, select_by: Mapping[str, str], *, extra: str = "NULL") -> list[Row]:
    """Return the devices with all these labels, by name; ``extra`` is an additional column."""
    rows = session.rows(_DEVICES.format(extra=extra, condition=""))
    if not select_by:
        return rows
    wanted = select_by.items()
    return [row for row in rows if wanted <= json.loads(row["labels"]).items()]


def remove(session: Session, name: str) -> None:
    """Remove a device, except for its name and version (see :mod:`kedge.fleet.schema`)."""
    number = find(session, name)
    for table in schema.PER_DEVICE:
        session.run(f"DELETE FROM {table} WHERE device_id = ?", (number,))
    session.run("UPDATE rollout_stage SET edition = edition + 1 WHERE live > 0")
    session.run("UPDATE device SET removed = 1, managed = 0 WHERE id = ?", (number,))
    note_change(session)


def rows_of(session: Session, rows: Sequence[Row]) -> tuple[DeviceRow, ...]:
    """These rows of :func:`selected` (``extra``: whether it reported) for a list."""
    serves: dict[int, dict[str, str]] = {}
    query = """
        SELECT device_id, model, version FROM reported_model
        WHERE digest IS NOT NULL AND device_id IN {} ORDER BY model
    """
    for row in session.where_in(query, [row["id"] for row in rows]):
        serves.setdefault(row["device_id"], {})[row["model"]] = row["version"] or ""
    return tuple(
        DeviceRow(
            name=row["name"],
            target=row["target"],
            labels=json.loads(row["labels"]),
            online=bool(row["online"]),
            seen_at=row["seen_at"] or 0.0,
            heard=bool(row[8]),
            serves=serves.get(row["id"], {}),
            reported_target=reported_target(row),
        )
        for row in rows
    )


def reported_target(row: Row) -> str | None:
    """Return the target that the device reports, if it differs."""
    told: str | None = row["told_target"]
    return None if told == row["target"] else told


def views(session: Session, rows: Sequence[Row]) -> tuple[DeviceView, ...]:
    """These rows of :func:`selected` (``extra``: the report) with all that is known of each."""
    desired: dict[int, dict[str, str]] = {}
    query = "SELECT device_id, model, digest FROM desired_model WHERE device_id IN {} ORDER BY model"
    for row in session.where_in(query, [row["id"] for row in rows]):
        desired.setdefault(row["device_id"], {})[row["model"]] = row["digest"]
    return tuple(_view(row, desired.get(row["id"], {})) for row in rows)


def view(session: Session, number: int) -> DeviceView:
    """Return the view of one device."""
    query = _DEVICES.format(extra="reported", condition="AND device.id = ?")
    return views(session, session.rows(query, (number,)))[0]


def _view(row: Row, desired: dict[str, str]) -> DeviceView:
    reported = None if row[8] is None else codec.decode(row[8], Reported, where=f"report of {row['name']}")
    return DeviceView(
        name=row["name"],
        target=row["target"],
        labels=json.loads(row["labels"]),
        online=bool(row["online"]),
        seen_at=row["seen_at"] or 0.0,
        desired_version=row["desired_version"],
        desired=desired,
        reported=reported,
        reported_target=reported_target(row),
    )


def desired_state(session: Session, number: int, version: int) -> Desired:
    """Return the desired state of a device."""
    return desired_states(session, {number: version}, [number])[number]


def desired_states(session: Session, versions: Mapping[int, int], numbers: Sequence[int]) -> dict[int, Desired]:
    """Return the desired states of these devices, without what a signature needs.

    Args:
        versions: device → its desired version.
    """
    models: dict[int, list[Row]] = {number: [] for number in numbers}
    shadows: dict[int, list[Row]] = {number: [] for number in numbers}
    query = "SELECT * FROM desired_model WHERE device_id IN {} ORDER BY model"
    for row in session.where_in(query, numbers):
        models[row["device_id"]].append(row)
    # A shadow of a model that a device is not to have, or of itself, is none.
    query = """
        SELECT shadow.* FROM desired_shadow AS shadow JOIN desired_model AS own
          ON own.device_id = shadow.device_id AND own.model = shadow.model AND own.digest <> shadow.digest
            AND own.rival IS NOT shadow.digest
        WHERE shadow.device_id IN {} ORDER BY shadow.model
    """
    for row in session.where_in(query, numbers):
        shadows[row["device_id"]].append(row)
    asked = _samples(session, numbers)
    return {
        number: Desired(
            version=versions[number],
            models={row["model"]: row["digest"] for row in models[number]},
            sizes={row["digest"]: row["size"] for row in (*models[number], *shadows[number])}
            | {row["rival"]: row["rival_size"] for row in models[number] if row["rival"]},
            rivals={row["model"]: row["rival"] for row in models[number] if row["rival"]},
            # A wave may soak for longer than a device waits for calls: then golden samples are sent meanwhile.
            soaks={row["model"]: min(row["soak"], MAX_SOAK) for row in models[number] if row["soak"]},
            shadows={
                row["model"]: Shadow(
                    digest=row["digest"], size=row["size"], share=row["share"], memory_bytes=row["memory_bytes"]
                )
                for row in shadows[number]
            },
            samples=asked.get(number, {}),
            orders={row["model"]: row["ordered"] for row in models[number] if row["ordered"]},
        )
        for number in numbers
    }


def _samples(session: Session, numbers: Sequence[int]) -> dict[int, dict[str, SampleRequest]]:
    """Return what samples these devices are asked for, by model."""
    query = """
        SELECT part.device_id, part.count, part.max_bytes, rid, asked.model, choice, below, seconds
        FROM sample_part AS part JOIN sample_request AS asked ON asked.id = request_id
        JOIN desired_model AS own ON own.device_id = part.device_id AND own.model = asked.model
        WHERE part.state IN ('asked', 'collecting', 'sending') AND part.device_id IN {}
    """
    found: dict[int, dict[str, SampleRequest]] = {}
    for row in session.where_in(query, numbers):
        found.setdefault(row["device_id"], {})[row["model"]] = SampleRequest(
            rid=row["rid"],
            where=Choice(row["choice"]),
            count=row["count"],
            max_bytes=row["max_bytes"],
            seconds=row["seconds"],
            below=row["below"],
        )
    return found


def transfers(session: Session, number: int) -> tuple[TransferView, ...]:
    """Return the transfers to the device, by blob."""
    query = """
        SELECT transfer.*, blob.size FROM transfer LEFT JOIN blob ON blob.digest = transfer.digest
        WHERE device_id = ? ORDER BY transfer.digest, kind
    """
    return tuple(
        TransferView(
            digest=row["digest"],
            kind=row["kind"],
            size=row["size"] or 0,
            blocks_served=row["blocks_served"],
            blocks_distinct=int.from_bytes(row["served"], "little").bit_count(),
            finished_served_again=row["finished_served_again"],
            bytes_served=row["bytes_served"],
        )
        for row in session.rows(query, (number,))
    )


def latencies(session: Session, target: str | None) -> tuple[Measurement, ...]:
    """Return the devices' measurements, by device, then by time."""
    query = """
        SELECT name, latency.target, bundle, files, p50_ms, p95_ms, calls, at
        FROM latency JOIN device ON device.id = device_id
        WHERE :target IS NULL OR latency.target = :target ORDER BY name, at
    """
    return tuple(
        Measurement(
            device=row["name"],
            target=row["target"],
            bundle=row["bundle"],
            files=row["files"],
            p50_ms=row["p50_ms"],
            p95_ms=row["p95_ms"],
            calls=row["calls"],
            at=row["at"],
        )
        for row in session.rows(query, {"target": target})
    )


def telemetry(session: Session, number: int) -> tuple[Telemetry, ...]:
    """Return the device's latest telemetry, oldest first."""
    query = "SELECT document FROM telemetry WHERE device_id = ? ORDER BY id DESC LIMIT ?"
    return tuple(_read(row["document"] for row in reversed(session.rows(query, (number, TELEMETRY_SHOWN)))))


def _read(documents: Iterable[bytes]) -> Iterable[Telemetry]:
    return (codec.decode(raw, Telemetry, where="telemetry") for raw in documents)

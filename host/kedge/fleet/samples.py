"""Requests for samples: hard cases come home from devices that allow it, as a data set."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kedge.fleet import audit, devices, rollouts, sample_parts
from kedge.fleet.database import Row, Session
from kedge.fleet.service import FleetService
from kedge_protocol import files, frames
from kedge_protocol.errors import ConfigError, FleetError, MessageError, StorageError
from kedge_protocol.samples import MAX_COUNT, Choice, SampleRequest

if TYPE_CHECKING:
    from kedge_protocol.frames import Call

SECONDS = 600.0
MAX_BYTES = 8 << 20
PATIENCE_SECONDS = 3600.0
"""A device may take so much longer than it looks, before it counts as silent."""


@dataclass(frozen=True, kw_only=True)
class SamplePart:
    """One device's part.

    Attributes:
        state: ``asked``, ``collecting``, ``sending``, ``done``, ``refused``, ``failed``, ``silent`` or ``cancelled``.
        detail: why, in words.
        seen, kept: samples that the device looked at and has chosen so far, as of its last report.
        samples, size: what came home, in samples and bytes.
    """

    device: str
    state: str
    detail: str
    seen: int
    kept: int
    samples: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked for, and how far that is.

    Attributes:
        state: ``open`` while a device may still send, then ``ended`` or ``cancelled``.
        count: samples that were asked for, of all devices together.
        ends_at: seconds since 1970 after which nothing is awaited any more.
    """

    id: int
    model: str
    where: Choice
    count: int
    state: str
    asked_at: float
    ends_at: float


@dataclass(frozen=True, kw_only=True)
class SampleView(Asked):
    """A request, device by device.

    Attributes:
        skipped: devices that were not asked, and why; told by :func:`request` only.
    """

    parts: tuple[SamplePart, ...]
    skipped: Mapping[str, str]

    @property
    def samples(self) -> int:
        """Samples that came home."""
        return sum(part.samples for part in self.parts)


@dataclass(frozen=True, kw_only=True)
class SampleSummary(Asked):
    """A request in counts.

    Attributes:
        counts: its devices by :attr:`SamplePart.state`.
        samples: that came home.
    """

    counts: Mapping[str, int]
    samples: int


@dataclass(frozen=True, kw_only=True)
class SamplesWritten:
    """A data set of samples.

    Attributes:
        path: the ``.npz``; ``about`` tells of each sample where it is from and what was answered.
        left_out: samples of another shape than the first one's, or that several devices sent.
    """

    path: Path
    about: Path
    samples: int
    left_out: int


def request(
    fleet: FleetService,
    model: str,
    where: Choice,
    count: int,
    select: Mapping[str, str] | None = None,
    *,
    seconds: float = SECONDS,
    max_bytes: int = MAX_BYTES,
    below: float = 1.0,
) -> SampleView:
    """Ask devices that serve a model for hard samples. Each looks at its live calls for a while, and then sends its
    equal part of the count; a device may allow less, or nothing.

    Args:
        select: labels that a device must carry.
        seconds: how long a device looks.
        max_bytes: of one device at most.
        below: for ``low-confidence``: only samples with less confidence.

    Raises:
        ConfigError: a number is out of range.
        FleetError: no selected device can be asked.
    """
    rid = secrets.token_hex(8)
    asked = SampleRequest(rid=rid, where=where, count=count, max_bytes=max_bytes, seconds=seconds, below=below)
    try:
        asked.check(where="samples")
    except MessageError as error:
        remedy = f"Use a count of 1 to {MAX_COUNT}, a time of up to 7 days, and a confidence above 0, up to 1"
        raise ConfigError(error.what, remedy=remedy) from error
    with fleet.database.write() as session:
        chosen, skipped = _chosen(session, model, select or {}, rid, count)
        now = session.now()
        number = session.insert(
            "INSERT INTO sample_request (rid, model, choice, count, below, seconds, asked_at, ends_at, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open')",
            (rid, model, where.value, count, below, seconds, now, now + seconds + PATIENCE_SECONDS),
        )
        each = math.ceil(count / len(chosen))
        session.run_many(
            "INSERT INTO sample_part VALUES (?, ?, ?, ?, 'asked', '', 0, 0, 0, 0)",
            [(number, device, each, max_bytes) for device in chosen],
        )
        rollouts.publish(session, list(chosen))
        evidence = {"model": model, "where": where.value, "count": count, "devices": len(chosen), "seconds": seconds}
        audit.append(session, fleet.actor, "samples.request", f"samples {number}", evidence)
        return _view(session, _find(session, number), skipped)


def _chosen(
    session: Session, model: str, select: Mapping[str, str], rid: str, count: int
) -> tuple[dict[int, str], dict[str, str]]:
    """Return the devices that are asked (number → name), and why others are not."""
    serving = {
        row["device_id"] for row in session.rows("SELECT device_id FROM desired_model WHERE model = ?", (model,))
    }
    query = """
        SELECT device_id, request_id FROM sample_part JOIN sample_request ON id = request_id
        WHERE model = ? AND sample_part.state IN ('asked', 'collecting', 'sending')
    """
    busy = {row["device_id"]: row["request_id"] for row in session.rows(query, (model,))}
    found: dict[int, str] = {}
    skipped: dict[str, str] = {}
    for row in devices.select_devices(session, select):
        if row["id"] not in serving:
            skipped[row["name"]] = f"it is not to have {model}"
        elif row["id"] in busy:
            skipped[row["name"]] = f"request {busy[row['id']]} is under way there"
        else:
            found[row["id"]] = row["name"]
    if not found:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        raise FleetError(
            f"no device can be asked for samples of {model}" + (f" ({reasons})" if reasons else ""),
            remedy="See kedge device list, and kedge samples show",
        )
    drawn = sorted(found, key=lambda number: hashlib.sha256(f"{rid} {found[number]}".encode()).digest())[:count]
    skipped |= {found[number]: "others were drawn" for number in sorted(found.keys() - set(drawn))}
    return {number: found[number] for number in drawn}, skipped


def show(fleet: FleetService, number: int | None = None, *, limit: int | None = None) -> tuple[SampleView, ...]:
    """Return one request, or the latest, newest first.

    Args:
        limit: so many of the latest; None for all.

    Raises:
        FleetError: there is no such request.
    """
    with fleet.database.read() as session:
        if number is not None:
            return (_view(session, _find(session, number)),)
        query = "SELECT * FROM sample_request ORDER BY id DESC LIMIT ?"
        return tuple(_view(session, row) for row in session.rows(query, (-1 if limit is None else limit,)))


def latest(fleet: FleetService, limit: int) -> tuple[SampleSummary, ...]:
    """Return the latest requests in counts, newest first."""
    query = "SELECT request_id, state, count(*) AS devices, sum(samples) AS samples FROM sample_part"
    query += " WHERE request_id IN {} GROUP BY request_id, state ORDER BY state"
    with fleet.database.read() as session:
        asked = session.rows("SELECT * FROM sample_request ORDER BY id DESC LIMIT ?", (limit,))
        parts: dict[int, list[Row]] = {row["id"]: [] for row in asked}
        for row in session.where_in(query, list(parts)):
            parts[row["request_id"]].append(row)
    return tuple(
        SampleSummary(
            **_asked(row),
            counts={part["state"]: part["devices"] for part in parts[row["id"]]},
            samples=sum(part["samples"] for part in parts[row["id"]]),
        )
        for row in asked
    )


def cancel(fleet: FleetService, number: int) -> SampleView:
    """End a request: devices drop what they have chosen. What came home stays.

    Raises:
        FleetError: there is no such request.
    """
    with fleet.database.write() as session:
        asked = _find(session, number)
        query = "SELECT device_id FROM sample_part WHERE request_id = ? AND state IN ('asked', 'collecting', 'sending')"
        numbers = [row["device_id"] for row in session.rows(query, (asked["id"],))]
        if numbers:
            session.run("UPDATE sample_request SET state = 'cancelled' WHERE id = ?", (asked["id"],))
            session.run_many(
                "UPDATE sample_part SET state = 'cancelled' WHERE request_id = ? AND device_id = ?",
                [(asked["id"], device) for device in numbers],
            )
            sample_parts.over(session, numbers)
            audit.append(session, fleet.actor, "samples.cancel", f"samples {number}", {"devices": len(numbers)})
        return _view(session, _find(session, number))


def remove(fleet: FleetService, number: int) -> None:
    """Delete a request and the samples that came home.

    Raises:
        FleetError: there is no such request, or it is under way.
    """
    with fleet.database.write() as session:
        asked = _find(session, number)
        if asked["state"] == "open":
            raise FleetError(f"request {number} is under way", remedy=f"Cancel it first: kedge samples cancel {number}")
        shutil.rmtree(_folder(fleet, asked), ignore_errors=True)
        session.run("DELETE FROM sample_part WHERE request_id = ?", (asked["id"],))
        session.run("DELETE FROM sample_request WHERE id = ?", (asked["id"],))
        audit.append(session, fleet.actor, "samples.remove", f"samples {number}")


def export(fleet: FleetService, number: int, out: Path) -> SamplesWritten:
    """Write the samples of a request as a data set that ``kedge compile --evaluation`` reads: an array for each input,
    the samples along the first axis, those with the least confidence first. Beside it, ``.json`` tells of each sample
    which device and bundle it is from, how sure the answer was, and which class it was. Labels are for people to add.

    Raises:
        FleetError: there is no such request, or nothing came home yet.
        StorageError: the files cannot be written.
    """
    with fleet.database.write() as session:
        asked = _find(session, number)
        parts = _view(session, asked).parts
        found = [
            (part.device, frames.decode(*frame))
            for part in parts
            if part.samples
            for frame in frames.split((_folder(fleet, asked) / f"{part.device}.frames").read_bytes())
        ]
        if not found:
            raise FleetError(f"nothing came home for request {number} yet", remedy=f"See kedge samples show {number}")
        kept = _kept(found, asked["count"])
        about = out.with_suffix(".json")
        try:
            with files.new_file(out) as file:
                _write_arrays(file, [call for _, call in kept])
            files.write(about, json.dumps([_told(device, call) for device, call in kept], indent=1).encode())
        except OSError as error:
            raise StorageError(f"cannot be written: {error.strerror}", where=str(out)) from error
        audit.append(session, fleet.actor, "samples.export", f"samples {number}", {"samples": len(kept)})
    return SamplesWritten(path=out, about=about, samples=len(kept), left_out=len(found) - len(kept))


def _kept(found: Sequence[tuple[str, Call]], count: int) -> list[tuple[str, Call]]:
    def form(call: Call) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (array.dtype.str, array.shape) for name, array in call.inputs.items()}

    ordered = sorted(found, key=lambda one: math.inf if one[1].confidence is None else one[1].confidence)
    first, seen, kept = form(ordered[0][1]), set(), []
    for device, call in ordered:
        content = b"".join(array.tobytes() for array in call.inputs.values())
        if form(call) == first and content not in seen:
            seen.add(content)
            kept.append((device, call))
    return kept[:count]


def _write_arrays(file: BinaryIO, calls: Sequence[Call]) -> None:
    """Write an ``.npz``; numpy's own function takes no array of the name ``file``."""
    import numpy as np

    with zipfile.ZipFile(file, "w") as archive:
        for name in calls[0].inputs:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.concatenate([call.inputs[name] for call in calls]))


def _told(device: str, call: Call) -> dict[str, object]:
    classes = {
        name: int(array.argmax()) for name, array in call.outputs.items() if array.ndim == 2 and array.shape[1] > 1
    }
    told = {"device": device, "bundle": call.digest, "confidence": call.confidence, "disagrees": call.disagrees}
    return told | {"classes": classes}


def _folder(fleet: FleetService, asked: Row) -> Path:
    return fleet.state / "samples" / str(asked["rid"])


def _find(session: Session, number: int) -> Row:
    found = session.row("SELECT * FROM sample_request WHERE id = ?", (number,)) if 0 < number < 1 << 63 else None
    if found is None:
        raise FleetError(f"there is no request {number} for samples", remedy="See kedge samples show")
    return found


def _asked(row: Row) -> dict[str, Any]:
    """Return the fields of :class:`Asked` of a row of ``sample_request``."""
    same = ("id", "model", "count", "state", "asked_at", "ends_at")
    return {**{name: row[name] for name in same}, "where": Choice(row["choice"])}


def _view(session: Session, asked: Row, skipped: Mapping[str, str] | None = None) -> SampleView:
    query = """
        SELECT sample_part.*, name FROM sample_part JOIN device ON device.id = device_id
        WHERE request_id = ? ORDER BY name
    """
    return SampleView(
        **_asked(asked),
        parts=tuple(
            SamplePart(
                device=row["name"],
                state=row["state"],
                detail=row["detail"],
                seen=row["seen"],
                kept=row["kept"],
                samples=row["samples"],
                size=row["size"],
            )
            for row in session.rows(query, (asked["id"],))
        ),
        skipped=dict(skipped or {}),
    )

"""Shadows: a release's bundles beside those that serve, on a share of the devices' live inputs, and what they said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from kedge.fleet import audit, call_figures, devices, releases, rollouts
from kedge.fleet.call_figures import ShadowFigures
from kedge.fleet.candidates import best_of_release
from kedge.fleet.database import Row
from kedge.fleet.rollouts import Wanted
from kedge.fleet.service import FleetService
from kedge.fleet.staged.effects import OFTEN
from kedge_protocol import codec, latency_buckets
from kedge_protocol.errors import ConfigError, FleetError
from kedge_protocol.messages import ReportedShadow

SHARE = 0.1
MEMORY_BYTES = 512 << 20

_WANTED = """
SELECT shadow.device_id, name, model, digest, reported FROM desired_shadow AS shadow
JOIN device ON device.id = shadow.device_id LEFT JOIN device_state AS told ON told.device_id = shadow.device_id
WHERE (:model IS NULL OR model = :model) AND (:device IS NULL OR name = :device) ORDER BY model, name
"""
_ANSWERED = """
SELECT shadow.device_id, shadow.model, json_extract(CAST(document AS TEXT), '$.shadow') AS told
FROM desired_shadow AS shadow
JOIN device ON device.id = shadow.device_id
JOIN call_figures AS figures ON figures.device_id = shadow.device_id AND figures.model = shadow.model
    AND figures.shadow = shadow.digest
WHERE (:model IS NULL OR shadow.model = :model) AND (:device IS NULL OR name = :device)
ORDER BY until
"""


@dataclass(frozen=True, kw_only=True)
class ShadowView:
    """What one device's shadow answered beside the bundle that serves.

    Attributes:
        digest: of the shadow.
        state: what the device reports of it; None before.
        compared, agreed: inputs that it was shown, and those that it answered like the bundle that serves.
        errors: of those it was shown, the calls on which it failed.
        classes: class of the old answer → (compared, agreed).
        confidence_shift: mean of new less old confidence; None without a compared sample.
        old_p95_ms, new_p95_ms: latencies of the same calls.
    """

    device: str
    model: str
    digest: str
    state: ReportedShadow | None = None
    compared: int = 0
    agreed: int = 0
    errors: int = 0
    classes: dict[str, tuple[int, int]] = field(default_factory=dict)
    confidence_shift: float | None = None
    old_p95_ms: float = 0.0
    new_p95_ms: float = 0.0

    @property
    def worst(self) -> tuple[str, float] | None:
        """The class with the smallest agreement among those that came often enough, and that agreement."""
        shares = [(agreed / compared, name) for name, (compared, agreed) in self.classes.items() if compared >= OFTEN]
        return None if not shares else (min(shares)[1], min(shares)[0])


def start(
    fleet: FleetService,
    reference: str,
    select: Mapping[str, str],
    *,
    share: float = SHARE,
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[str, ...]:
    """Run a release's bundles as shadows on devices that are to have the same model.

    Args:
        reference: ``NAME:VERSION``.
        select: labels that a device must carry.
        share: share of one processor core; a device may allow less.
        memory_bytes: resident memory beyond which a shadow is ended.

    Returns:
        The devices.

    Raises:
        ConfigError: a budget is out of range.
        FleetError: no such release, or no device serves the model with another bundle.
    """
    if not 0 < share <= 1 or memory_bytes < 1:
        raise ConfigError("the share or the memory of a shadow is out of range", remedy="Use a share above 0, up to 1")
    with fleet.database.write() as session:
        release = releases.find(session, reference)
        bundles = best_of_release(session, release)
        told: dict[int, Wanted] = {}
        names = []
        query = "SELECT device_id, digest FROM desired_model WHERE model = ?"
        serves = {row["device_id"]: row["digest"] for row in session.rows(query, (release["name"],))}
        for device in devices.select_devices(session, select):
            bundle, own = bundles.get(device["target"]), serves.get(device["id"])
            if bundle is not None and own is not None and own != bundle.digest:
                told[device["id"]] = bundle
                names.append(device["name"])
        if not told:
            raise FleetError(
                f"no selected device serves {release['name']} with another bundle than {reference}'s",
                remedy="Roll out the model first, or select other devices",
            )
        rollouts.shadow(session, release["name"], told, share=share, memory_bytes=memory_bytes)
        evidence = {"devices": len(told), "share": share, "memory_bytes": memory_bytes, "select": dict(select)}
        audit.append(session, fleet.actor, "shadow.start", reference, evidence)
    return tuple(names)


def stop(fleet: FleetService, model: str, select: Mapping[str, str]) -> tuple[str, ...]:
    """End the shadows of a model on devices with these labels; return the devices."""
    with fleet.database.write() as session:
        query = "SELECT device_id FROM desired_shadow WHERE model = ?"
        running = {row["device_id"] for row in session.rows(query, (model,))}
        told = [one for one in devices.select_devices(session, select) if one["id"] in running]
        rollouts.unshadow(session, model, [one["id"] for one in told])
        audit.append(session, fleet.actor, "shadow.stop", model, {"devices": len(told), "select": dict(select)})
    return tuple(one["name"] for one in told)


def show(fleet: FleetService, model: str | None = None, *, device: str | None = None) -> tuple[ShadowView, ...]:
    """Return what the shadows answered, by device and model; all in two statements, whatever the number of devices."""
    wanted = {"model": model, "device": device}
    with fleet.database.read() as session:
        figures: dict[tuple[int, str], ShadowFigures] = {}
        for row in session.rows(_ANSWERED, wanted):
            told = call_figures.read_shadow(json.loads(row["told"]))
            if told is not None:
                figures[row["device_id"], row["model"]] = told
        return tuple(_view(row, figures.get((row["device_id"], row["model"]))) for row in session.rows(_WANTED, wanted))


def _view(row: Row, told: ShadowFigures | None) -> ShadowView:
    told = told or ShadowFigures(digest=row["digest"])
    compared = told.compared.total + told.total
    return ShadowView(
        device=row["name"],
        model=row["model"],
        digest=row["digest"],
        state=_state(row),
        compared=compared,
        agreed=compared - told.compared.bad - told.bad,
        errors=told.errors,
        classes=told.classes,
        confidence_shift=told.mean_shift,
        old_p95_ms=latency_buckets.percentiles_ms(told.old_buckets, (0.95,))[0],
        new_p95_ms=latency_buckets.percentiles_ms(told.new_buckets, (0.95,))[0],
    )


def _state(row: Row) -> ReportedShadow | None:
    """What the device says of the shadow that is wanted. Only this part of its report is read."""
    if row["reported"] is None:
        return None
    told = json.loads(row["reported"])["models"].get(row["model"], {}).get("shadow")
    state = None if told is None else codec.structure(told, ReportedShadow, where=f"report of {row['name']}")
    return state if state is not None and state.digest == row["digest"] else None

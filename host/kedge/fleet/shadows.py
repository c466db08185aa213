"""Shadows: a release's bundles beside those that serve, on a share of the devices' live inputs, and what they said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kedge.fleet import audit, devices, releases, rollouts
from kedge.fleet.candidates import best_of_release
from kedge.fleet.rollouts import Wanted
from kedge.fleet.service import FleetService
from kedge_protocol import latency_buckets
from kedge_protocol.errors import ConfigError, FleetError
from kedge_protocol.messages import ReportedShadow, Telemetry

SHARE = 0.1
MEMORY_BYTES = 512 << 20


@dataclass(frozen=True, kw_only=True)
class ShadowView:
    """What one device's shadow answered, summed over the telemetry that is kept.

    Attributes:
        digest: of the shadow.
        state: what the device reports of it; None before.
        compared, agreed, errors: samples, see :class:`kedge_protocol.messages.ShadowTelemetry`.
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
        """The class with the smallest agreement among those with ten samples or more, and that agreement."""
        shares = [(agreed / compared, name) for name, (compared, agreed) in self.classes.items() if compared >= 10]
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
        for device in devices.select_devices(session, select):
            bundle = bundles.get(device["target"])
            own = session.value(
                "SELECT digest FROM desired_model WHERE device_id = ? AND model = ?", (device["id"], release["name"])
            )
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


def show(fleet: FleetService, model: str | None = None) -> tuple[ShadowView, ...]:
    """Return what the shadows answered, by device and model."""
    with fleet.database.read() as session:
        query = """
            SELECT device_id, name, model, digest FROM desired_shadow JOIN device ON device.id = device_id
            WHERE :model IS NULL OR model = :model ORDER BY model, name
        """
        found = []
        for row in session.rows(query, {"model": model}):
            told = devices.view(session, row["device_id"]).reported
            reported = None if told is None else told.models.get(row["model"])
            messages = devices.telemetry(session, row["device_id"])
            state = None if reported is None else reported.shadow
            found.append(_summed(row["name"], row["model"], row["digest"], state, messages))
    return tuple(found)


def _summed(
    device: str, model: str, digest: str, state: ReportedShadow | None, messages: Sequence[Telemetry]
) -> ShadowView:
    parts = [message.models[model].shadow for message in messages if model in message.models]
    own = [part for part in parts if part is not None and part.digest == digest]
    classes: dict[str, tuple[int, int]] = {}
    for part in own:
        for name, counts in part.classes.items():
            if len(counts) == 2:
                known = classes.get(name, (0, 0))
                classes[name] = known[0] + counts[0], known[1] + counts[1]
    compared = sum(part.compared for part in own)
    old = latency_buckets.merged(part.old_buckets for part in own)
    new = latency_buckets.merged(part.new_buckets for part in own)
    return ShadowView(
        device=device,
        model=model,
        digest=digest,
        state=state if state is not None and state.digest == digest else None,
        compared=compared,
        agreed=sum(part.agreed for part in own),
        errors=sum(part.errors for part in own),
        classes=classes,
        confidence_shift=sum(part.confidence_shift for part in own) / compared if compared else None,
        old_p95_ms=latency_buckets.percentile_ms(old, 0.95),
        new_p95_ms=latency_buckets.percentile_ms(new, 0.95),
    )

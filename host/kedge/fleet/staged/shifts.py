"""Drift as evidence: how far samples are from a bundle's baseline, the new one's beside the old one's.

Each bundle has a baseline of its own, by which its devices count. What drifts with both bundles is the world's doing;
only what has drifted further since the switch is held against the release.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from kedge.fleet.staged.cohorts import DeviceDrift, DriftFigures
from kedge_protocol import drift
from kedge_protocol.drift import Kind, Stream

Counts = Mapping[str, Sequence[int]]
Sketch = tuple[Sequence[Stream], Counts]
"""A baseline, and what was counted by it."""


def figures(devices: Mapping[str, tuple[Sketch, Sketch]]) -> DriftFigures | None:
    """Return the drift of a cohort; None where no device has sketches of both bundles.

    Args:
        devices: device → its sketches with the new bundle and with the old one.
    """
    found = [_device(name, new, old) for name, (new, old) in devices.items()]
    known = [device for device in found if device.samples]
    if not known:
        return None
    new = _joined(new for new, _ in devices.values())
    old = _joined(old for _, old in devices.values())
    return DriftFigures(
        devices=tuple(known),
        inputs=_rise(new, old, Kind.INPUT),
        outputs=_rise(new, old, Kind.OUTPUT),
        confidence=_rise(new, old, Kind.CONFIDENCE),
    )


def _device(name: str, new: Sketch, old: Sketch) -> DeviceDrift:
    samples, before = drift.effective_samples(new[1]), drift.effective_samples(old[1])
    return DeviceDrift(
        device=name,
        samples=min(samples, before),
        inputs=_rise(new, old, Kind.INPUT),
        outputs=_rise(new, old, Kind.OUTPUT),
        confidence=_rise(new, old, Kind.CONFIDENCE),
    )


def _rise(new: Sketch, old: Sketch, kind: Kind) -> float | None:
    """How much further the streams of one kind have drifted, beyond what chance makes of so few samples."""
    after, before = _largest(new, kind), _largest(old, kind)
    return None if after is None or before is None else max(0.0, after - before)


def _largest(sketch: Sketch, kind: Kind) -> float | None:
    streams, counts = sketch
    found = drift.shifts([stream for stream in streams if stream.kind is kind], counts)
    return max((max(0.0, shift.psi - shift.chance) for shift in found), default=None)


def _joined(sketches: Iterable[Sketch]) -> Sketch:
    """Add the sketches of the first baseline; others have other bins."""
    first: Sequence[Stream] | None = None
    total: Counts = {}
    for streams, counts in sketches:
        first = streams if first is None else first
        if streams == first:
            total = drift.added(total, counts)
    return first or (), total

"""Latencies on the target: measured here if the target is this machine, measured by a device of the fleet, taken from
the record of an earlier search, or estimated and marked as such."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kedge.evaluation.latency_race import RelativeLatency
from kedge_protocol import codec
from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import ConfigError, MessageError
from kedge_targets.contract import Estimate
from kedge_targets.target import Target

HOST = "(the host that compiled)"
"""The name of the host in the record of a search, in place of a device's."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One bundle's latency on one device, in milliseconds of one call with one sample.

    Attributes:
        files: digest of the file that the runtime opens.
        bundle: digest of the bundle, if known.
        pace: relative to the float model by ONNX Runtime on the same device, if both were measured in alternation.
    """

    device: str
    target: str
    files: str
    p50_ms: float
    p95_ms: float
    bundle: str | None = None
    pace: RelativeLatency | None = None


@dataclass(frozen=True, kw_only=True)
class LatencyLog:
    """A file of measurements: ``search.json`` of a compilation, or what `kedge device latencies` writes."""

    measurements: tuple[Measurement, ...] = field(default_factory=tuple)


@dataclass(frozen=True, kw_only=True)
class TargetLatency:
    """The latency of one call on the target.

    Attributes:
        p50: milliseconds.
        source: where the value comes from, in words.
        estimated: whether these files were never measured on such a device.
        pace: relative to the float model by ONNX Runtime, measured in alternation on the host; None if it was not.
    """

    p50: float
    source: str
    estimated: bool
    pace: RelativeLatency | None = None

    @property
    def guessed(self) -> bool:
        """Return whether it is this host's for another processor, rather than the target's own or a vendor's estimate:
        it is said, and decides nothing between candidates."""
        return self.estimated and self.pace is not None


def read(path: Path) -> LatencyLog:
    """Read a record.

    Raises:
        ConfigError: the file cannot be read, or is not a record.
    """
    where = f"--latencies {path}"
    try:
        return codec.decode(path.read_bytes(), LatencyLog, where=where)
    except (OSError, MessageError) as error:
        said = error.what if isinstance(error, MessageError) else str(error)
        raise ConfigError(
            f"cannot be read: {said}", where=where, remedy="Give what `kedge device latencies -o FILE` wrote"
        ) from error


class LatencyTable:
    """The known latencies of one target.

    Args:
        measurements: of any targets; those of this target are used.
    """

    def __init__(self, target: Target, measurements: Iterable[Measurement] = ()) -> None:
        self._target = target
        self._known: dict[str, list[Measurement]] = {}
        for one in measurements:
            if one.target == target.name:
                self._known.setdefault(one.files, []).append(one)
        self._pairs: list[tuple[Measurement, float]] = []

    def seen(self, files: str, host_p50: float) -> None:
        """Record the host's latency of files, so that a device's measurement of the same files gives a ratio."""
        self._pairs += [(one, host_p50) for one in self._known.get(files, ()) if one.device != HOST]

    def knows(self, files: str) -> bool:
        """Return whether the record has these files."""
        return files in self._known

    def of(
        self,
        files: str,
        host_p50: float,
        verified: Verified,
        estimate: Estimate | None,
        *,
        pace: RelativeLatency | None = None,
    ) -> TargetLatency:
        """Return the latency of files on the target.

        Args:
            files: digest of the file that the runtime opens.
            host_p50: milliseconds on this host.
            verified: how far the host could verify the files.
            estimate: by the vendor's tools.
            pace: relative latency on the host.
        """
        if found := self._known.get(files):
            devices = sorted({one.device for one in found})
            source = "recorded in an earlier search" if devices == [HOST] else f"measured by {', '.join(devices)}"
            recorded = next((one.pace for one in found if devices == [HOST]), None)
            p50 = statistics.median(one.p50_ms for one in found)
            return TargetLatency(p50=p50, source=source, estimated=False, pace=recorded)
        if estimate is not None:
            return TargetLatency(p50=estimate.latency_ms, source=f"estimated by {estimate.source}", estimated=True)
        if verified is Verified.EXECUTED and self._target.processor.architecture == platform.machine():
            return TargetLatency(p50=host_p50, source="measured here", estimated=False, pace=pace)
        if self._pairs:
            ratio = statistics.median(one.p50_ms / max(host, 1e-9) for one, host in self._pairs)
            devices = sorted({one.device for one, _ in self._pairs})
            return TargetLatency(
                p50=host_p50 * ratio,
                source=f"estimated: {ratio:.3g} times the host's, as other files on {', '.join(devices)}",
                estimated=True,
                pace=pace,
            )
        source = f"estimated: this host's own time ({platform.machine()})"
        return TargetLatency(p50=host_p50, source=source, estimated=True, pace=pace)


def written(measurements: Sequence[Measurement]) -> str:
    """Return a record as text."""
    plain = codec.unstructure(LatencyLog(measurements=tuple(measurements)))
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"

"""Latencies of the target: measured here where the target is this machine, measured by a device of the fleet, taken
from the record of an earlier search, or estimated, which is then said."""

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
"""Stands for a device's name in the record of a search."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One bundle's latency on one device, in milliseconds of one call with one sample.

    Attributes:
        files: digest of the file that the runtime opens.
        bundle: digest of the bundle, where it is known.
        pace: beside the float model by ONNX Runtime on the same device, where both were measured in turns.
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
    """What one call takes on the target.

    Attributes:
        p50: milliseconds.
        source: who says so, in words.
        estimated: nothing measured these files on such a device.
        pace: beside the float model by ONNX Runtime, measured in turns on the host; None where another measured.
    """

    p50: float
    source: str
    estimated: bool
    pace: RelativeLatency | None = None


def read(path: Path) -> LatencyLog:
    """Read a record.

    Raises:
        ConfigError: cannot be read, or is none.
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
    """What is known of one target's latencies.

    Args:
        measurements: of any targets; those of this one are used.
    """

    def __init__(self, target: Target, measurements: Iterable[Measurement] = ()) -> None:
        self._target = target
        self._known: dict[str, list[Measurement]] = {}
        for one in measurements:
            if one.target == target.name:
                self._known.setdefault(one.files, []).append(one)
        self._pairs: list[tuple[Measurement, float]] = []

    def seen(self, files: str, host_p50: float) -> None:
        """Tell what the host took for files, so that the device's measurement of the same gives a ratio."""
        self._pairs += [(one, host_p50) for one in self._known.get(files, ()) if one.device != HOST]

    def knows(self, files: str) -> bool:
        """Whether the record has these files."""
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
        """What these files take on the target.

        Args:
            files: digest of the file that the runtime opens.
            host_p50: milliseconds here.
            verified: how far the host could prove the files.
            estimate: of the vendor's tools.
            pace: on the host.
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
    """The text of a record."""
    plain = codec.unstructure(LatencyLog(measurements=tuple(measurements)))
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"

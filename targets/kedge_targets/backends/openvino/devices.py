"""Chooses the device that runs a model and its hints, and what to do if it cannot."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import ConfigError

CPU, NPU = "CPU", "NPU"
KINDS = (CPU, "GPU", NPU)
PRECISIONS = ("f32", "f16", "bf16")

KNOWN_OPTIONS = frozenset({"device", "threads", "precision", "streams", "cache"})
CACHE_DIR = "cache_dir"
"""Option that :func:`cache_folder` gives to the runtime; never part of a target's file."""

_KEPT = 2  # compiled models of one name: of this version and of the one before, for going back

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Checked options.

    Attributes:
        device: OpenVINO's name, such as ``GPU.1``.
        threads: number of CPU threads for one call; 0 lets the library choose.
        precision: precision of everything that is not quantized.
        streams: number of simultaneous calls; 0 for one.
        cache: whether to keep compiled models.
        cache_dir: folder for them; None if nothing is kept.
    """

    device: str = CPU
    threads: int = 0
    precision: str = "f32"
    streams: int = 0
    cache: bool = False
    cache_dir: str | None = None

    @property
    def kind(self) -> str:
        """Return ``CPU``, ``GPU`` or ``NPU``."""
        return self.device.partition(".")[0]

    @property
    def on_cpu(self) -> bool:
        """Return whether the requested device is the CPU."""
        return self.kind == CPU

    def hints(self, supported: Mapping[str, Any]) -> dict[str, Any]:
        """Return the properties for compiling.

        Args:
            supported: properties that the device supports, by name.
        """
        wanted: dict[str, Any] = {
            "PERFORMANCE_HINT": "THROUGHPUT" if self.streams > 1 else "LATENCY",
            "INFERENCE_PRECISION_HINT": self.precision,
        }
        if self.threads:
            wanted["INFERENCE_NUM_THREADS"] = self.threads
        if self.streams:
            wanted["NUM_STREAMS"] = str(self.streams)
        made = {name: value for name, value in wanted.items() if name in supported}
        return {**made, "CACHE_DIR": self.cache_dir} if self.cache_dir else made

    def for_cpu(self) -> Settings:
        """Return the settings for a CPU that stands in: computing in float32 as the host did, without a cache."""
        return Settings(threads=self.threads, streams=self.streams)


def settings(options: Mapping[str, Any]) -> Settings:
    """Check a runtime's options.

    Raises:
        ConfigError: an option is unknown or has a wrong value.
    """
    if unknown := sorted(set(options) - KNOWN_OPTIONS - {CACHE_DIR}):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(KNOWN_OPTIONS)}")
    device = str(options.get("device", CPU))
    made = Settings(
        device=device,
        threads=_count(options, "threads", "number of threads"),
        precision=options.get("precision", "f32"),
        streams=_count(options, "streams", "number of streams"),
        cache=options.get("cache", not device.startswith(CPU)),
        cache_dir=options.get(CACHE_DIR),
    )
    if made.kind not in KINDS:
        raise ConfigError(f"device = {device!r} is unknown", remedy=f"Known are {', '.join(KINDS)}")
    if made.precision not in PRECISIONS:
        raise ConfigError(f"precision = {made.precision!r} is unknown", remedy=f"Known are {', '.join(PRECISIONS)}")
    if not isinstance(made.cache, bool):
        raise ConfigError(f"cache = {made.cache!r} is neither true nor false")
    return made


def _count(options: Mapping[str, Any], name: str, what: str) -> int:
    value = options.get(name, 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"{name} = {value!r} is no {what}", remedy="Give 0 or more")
    return value


def absent(core: Any, wanted: Settings) -> str:
    """Return why a device is not available, in words; empty if it is."""
    found = [str(name) for name in core.available_devices]
    if any(name == wanted.device or name.partition(".")[0] == wanted.device for name in found):
        return ""
    return f"OpenVINO sees no {wanted.device} here, only {', '.join(found)}"


def supported(core: Any, device: str) -> Mapping[str, Any]:
    """Return the properties that a device supports."""
    return {str(name): how for name, how in core.get_property(device, "SUPPORTED_PROPERTIES").items()}


def described(compiled: Any, wanted: Settings) -> str:
    """Describe what runs a model, for status: ``NPU (Intel(R) AI Boost), compiled earlier``."""
    name = wanted.device
    # Not every plugin answers.
    with contextlib.suppress(RuntimeError):
        name = f"{wanted.device} ({compiled.get_property('FULL_DEVICE_NAME')})"
    with contextlib.suppress(RuntimeError):
        if compiled.get_property("LOADED_FROM_CACHE"):
            name += ", compiled earlier"
    return name


def cache_folder(cache: Path, config: BundleConfig) -> Path | None:
    """Return the folder for a bundle's compiled model, creating it if necessary and removing what older versions left.
    Return None if it cannot be created; the model is then compiled at each start.

    OpenVINO names its cache files after the model, the device and its own version, and recompiles if it cannot read
    them; but it never deletes any.
    """
    of_name = cache / "openvino" / config.name
    folder = of_name / config.golden.digest.rpartition(":")[2][:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
        by_age = sorted(of_name.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
        for old in by_age[_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        log.warning("compiled models cannot be kept in %s: %s", of_name, error.strerror)
        return None
    return folder

"""Identifies this device as far as an engine depends on it, and names its engines."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import asdict, dataclass
from pathlib import Path

from kedge_protocol import codec, digest
from kedge_protocol.errors import MissingDependencyError, StorageError
from kedge_targets import jetson
from kedge_targets.backends.tensorrt import api, cuda
from kedge_targets.backends.tensorrt.cache import name_of
from kedge_targets.backends.tensorrt.recipe import Line, Recipe

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Identity:
    """What an engine is tied to.

    Attributes:
        tensorrt: its exact version.
        gpu: the GPU's name; ``capability``: its compute capability.
        power_mode: power mode of a Jetson, empty elsewhere; clocks and the number of cores decide which kernels are
            fastest.
    """

    tensorrt: str
    gpu: str
    capability: str
    power_mode: str

    def __str__(self) -> str:
        mode = f", mode {self.power_mode}" if self.power_mode else ""
        return f"TensorRT {self.tensorrt} on {self.gpu} (compute capability {self.capability}{mode})"


def identity() -> Identity:
    """Return this device's identity.

    Raises:
        MissingDependencyError: there is no TensorRT, no cuda-python or no GPU.
    """
    version = api.load().version
    gpu = cuda.gpu()
    return Identity(version, gpu.name, gpu.capability, jetson.power_mode() or "")


def line_of(recipe: Recipe, version: str) -> Line:
    """Return how this TensorRT builds.

    Raises:
        MissingDependencyError: the recipe has no line for it.
    """
    found = recipe.line(version)
    if found is None:
        known = ", ".join(f"{line.first} to below {line.below}" for line in recipe.lines)
        raise MissingDependencyError(
            f"the recipe has nothing for TensorRT {version}", remedy=f"It knows {known}: compile the model again"
        )
    return found


def engine_name(entry: Path, recipe: Recipe, kernel_set: str, of: Identity) -> str:
    """Return the name of one graph's engine here; another graph, recipe, TensorRT, GPU or power mode gives another
    name.

    Raises:
        MissingDependencyError: see :func:`line_of`.
        StorageError: the graph cannot be read.
    """
    graph = entry.parent / recipe.files[kernel_set]
    try:
        status = graph.stat()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=graph.name) from error
    line = line_of(recipe, of.tensorrt)
    how = {
        "graph": _digest(graph, status.st_mtime_ns, status.st_size, status.st_ino),
        "flags": [*line.network_flags, *line.builder_flags.get(kernel_set, ())],
        "workspace": recipe.workspace_bytes,
        "inputs": codec.unstructure(recipe.inputs),
    }
    return name_of("engine", {**how, **asdict(of)})


def boot_id() -> str:
    """Return the identifier of this boot of the kernel; empty if there is none."""
    with contextlib.suppress(OSError):
        return _BOOT_ID.read_text(encoding="ascii").strip()
    return ""


def missing() -> str | None:
    """Return why there is no TensorRT here, in words, or None if there is."""
    try:
        identity()
    except MissingDependencyError as error:
        return error.what
    return None


@functools.lru_cache(maxsize=16)
def _digest(graph: Path, *_: int) -> str:
    """Return the digest of a graph, cached by the file's status and not by its name alone, since a slot may be
    replaced."""
    return digest.of_file(graph)

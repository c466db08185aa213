"""The recipe in a bundle: how a device builds its engine, for each release line of TensorRT.

An engine is valid for one version of TensorRT on one type of GPU, and loading a foreign one runs its code; so a bundle
carries graphs and this recipe, never an engine. The recipe is pure data: the device reads it with the standard library
and :mod:`kedge_protocol`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol import codec
from kedge_protocol.errors import ConfigError, KedgeError, StorageError
from kedge_protocol.packages import version_numbers

ENTRY = "recipe.json"
INT8 = "int8"
FP16 = "fp16"
FILES = {INT8: "model_int8_qdq.onnx", FP16: "model_fp16.onnx"}
"""Precision → the graph's file beside the recipe."""

CACHE = "cache"
"""Load option of the device: the folder that holds its engines."""
ONLY_ENGINES = "only_engines"
"""Load option of the device: fail if there is no engine, rather than run the model another way."""

FORM = 1
"""Version of the recipe's format; a device refuses any other."""


@dataclass(frozen=True, kw_only=True)
class InputProfile:
    """The shapes of one input for which an engine is built.

    Attributes:
        name: name in the graphs.
        minimum, optimum, maximum: shapes with the batch first; all three are equal if the shape is static.
    """

    name: str
    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    @property
    def static(self) -> bool:
        """Return whether there is only one shape."""
        return self.minimum == self.maximum


@dataclass(frozen=True, kw_only=True)
class Line:
    """How versions of one line of TensorRT build.

    Attributes:
        first, below: the line's versions, ``first <= version < below``.
        network_flags: members of ``tensorrt.NetworkDefinitionCreationFlag`` for the network.
        builder_flags: precision → members of ``tensorrt.BuilderFlag`` for its graph.
    """

    first: str
    below: str
    network_flags: tuple[str, ...]
    builder_flags: dict[str, tuple[str, ...]]

    def holds(self, version: str) -> bool:
        """Return whether a version (``10.3.0.30``) belongs to the line."""
        return numbers(self.first) <= numbers(version) < numbers(self.below)


# With explicit QDQ the flags of 8.6 and 10.x let the builder take int8 where the graph has it and fp16 for the rest.
# 8.6 takes ONNX graphs only with an explicit batch. 11 has neither the flags nor calibrators: what the graph's types
# say is what is built.
LINES = (
    Line(
        first="8.6",
        below="10.0",
        network_flags=("EXPLICIT_BATCH",),
        builder_flags={INT8: ("INT8", "FP16"), FP16: ("FP16",)},
    ),
    Line(first="10.0", below="11.0", network_flags=(), builder_flags={INT8: ("INT8", "FP16"), FP16: ("FP16",)}),
    Line(first="11.0", below="12.0", network_flags=("STRONGLY_TYPED",), builder_flags={INT8: (), FP16: ()}),
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a device needs in addition to the graphs.

    Attributes:
        form: see :data:`FORM`.
        precisions: offered precisions, in the plan's order of preference; the device measures them and keeps the
            fastest that passes the golden vectors.
        files: precision → title of its graph, beside the recipe.
        workspace_bytes: scratch memory that the builder and the engine may use (``MemoryPoolType.WORKSPACE``).
        inputs: profiles of the inputs, in the graphs' order.
        outputs: names, in the graphs' order.
        lines: those whose versions accept these graphs.
    """

    form: int = FORM
    precisions: tuple[str, ...]
    files: dict[str, str]
    workspace_bytes: int
    inputs: tuple[InputProfile, ...]
    outputs: tuple[str, ...]
    lines: tuple[Line, ...] = LINES

    @property
    def static(self) -> bool:
        """Return whether every input has only one shape."""
        return all(item.static for item in self.inputs)

    def line(self, version: str) -> Line | None:
        """Return the line of a TensorRT version, or None if the recipe has none for it."""
        return next((line for line in self.lines if line.holds(version)), None)


def numbers(version: str) -> tuple[int, ...]:
    """Return ``10.3.0.30`` as numbers for comparison: the first four, missing ones are 0."""
    return (*version_numbers(version), 0, 0, 0, 0)[:4]


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe; equal recipes give equal bytes.

    Raises:
        StorageError: the disk is full or not writable.
    """
    text = json.dumps(codec.unstructure(recipe), indent=1, sort_keys=True)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error


def read(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        StorageError: the file cannot be read.
        ConfigError: the file is not a recipe, or has another format version.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot be read: {error.strerror}", where=str(path)) from error
    try:
        recipe = codec.structure(codec.loads(raw, where=path.name), Recipe, where=path.name)
        _check(recipe)
    except ConfigError:
        raise
    except (KedgeError, ValueError, TypeError) as error:
        raise ConfigError(f"is no recipe: {error}", where=path.name) from error
    return recipe


def _check(recipe: Recipe) -> None:
    if recipe.form != FORM:
        raise ConfigError(
            f"is of form {recipe.form}, this Kedge knows {FORM}", where=ENTRY, remedy="Update Kedge on the device"
        )
    if not recipe.precisions or set(recipe.precisions) - set(recipe.files):
        raise ConfigError(f"offers precisions {recipe.precisions} without their files", where=ENTRY)
    for title in recipe.files.values():
        if Path(title).name != title:
            raise ConfigError(f"names a file that does not lie beside it: {title!r}", where=ENTRY)
    for item in recipe.inputs:
        sizes = list(zip(item.minimum, item.optimum, item.maximum, strict=False))
        if len({len(item.minimum), len(item.optimum), len(item.maximum)}) != 1 or any(
            not 0 < low <= best <= high for low, best, high in sizes
        ):
            raise ConfigError(f"has no order in the shapes of input {item.name!r}", where=ENTRY)

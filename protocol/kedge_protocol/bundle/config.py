"""The configuration blob of a bundle, typed and versioned.

A device reads only this blob to decide whether it can run the bundle, before it pulls the model's files.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from kedge_protocol.bundle.generation import Generation
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_protocol.bundle.preprocess import Preprocess as Preprocess
from kedge_protocol.drift import Stream

SCHEMA_VERSION = 1

NO_BATCH = -1
"""The batch axis of a tensor without one (a sample rate, a list of detections)."""

TEXT = "str"
"""The dtype of a tensor of texts."""


class Verified(str, enum.Enum):
    """How far a bundle was verified on the host."""

    EXECUTED = "executed"  # run with the runtime that the device uses
    EMULATED = "emulated"  # the same, on an emulated processor of the device's kind
    SIMULATED = "simulated"  # run by a bit-exact simulator
    COMPILED = "compiled"  # the vendor's compiler made the device's file
    CHECKED = "checked"  # the vendor's parser accepted it


@dataclass(frozen=True, kw_only=True)
class FileTensor:
    """A tensor as it is in the model's file.

    Attributes:
        name: the name in the file.
        index: the position among the file's inputs or outputs.
        shape: the shape in the file; None for a free dimension.
        dtype: NumPy's name (``float32``, ``int8``, …); :data:`TEXT` for texts.
        permutation: ``file = model.transpose(permutation)``; None if the axes are the same.
        scale, zero_point: ``real = (file - zero_point) * scale``; None if the file's tensor is not quantized.
    """

    name: str
    index: int
    shape: tuple[int | None, ...]
    dtype: str
    permutation: tuple[int, ...] | None = None
    scale: float | None = None
    zero_point: int | None = None


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A tensor as the caller sees it: with the trained model's name, shape and dtype, regardless of the file's.

    Attributes:
        shape: the shape; None for a free dimension.
        layout: ``NCHW``, ``NHWC``, … if known.
        preprocess: for inputs: the conversion of raw samples, applied before anything else.
        batch_axis: the batch axis in ``shape``; :data:`NO_BATCH` for a tensor without a batch. The file then has a
            first axis of one sample before those of ``shape``, which ``file.permutation`` includes.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    file: FileTensor
    layout: str | None = None
    preprocess: Preprocess | None = None
    batch_axis: int = 0

    @property
    def batched(self) -> bool:
        """Whether the tensor has a batch axis."""
        return self.batch_axis != NO_BATCH


@dataclass(frozen=True, kw_only=True)
class State:
    """A state: an input that takes the output of the previous call; zeros in the first call."""

    input: str
    output: str


@dataclass(frozen=True, kw_only=True)
class RuntimeRequirement:
    """One runtime that can run the bundle: an installed distribution with ``minimum`` <= version < ``below``."""

    distribution: str
    minimum: str
    below: str | None = None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """The metric measured on the packed files, and where it was measured.

    Attributes:
        name: ``top1``, ``agreement``, ``cosine`` or the user's function.
        value: the value for the packed files; ``reference`` is that of the float model.
        agreement: the fraction of samples (0..1) with the float model's answer; None if that has no meaning.
        samples: the number of samples evaluated.
        measured_on: the runtime with its version, and the architecture.
    """

    name: str
    value: float
    reference: float
    samples: int
    measured_on: str
    agreement: float | None = None


@dataclass(frozen=True, kw_only=True)
class Resources:
    """The bundle's needs on the device, in bytes: its files on disk, and an estimate of the model's memory in addition
    to the runtime's own (the files twice, as read and as repacked by the runtime, and every tensor of one sample).

    It is an estimate and not a measurement, so that equal input gives an equal digest; the host's measurements are in
    the report.
    """

    storage_bytes: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of the bundle, without times and paths: equal input gives an equal digest."""

    model_digest: str
    calibration_digest: str | None = None
    evaluation_digest: str
    calibration_samples: int
    evaluation_samples: int
    tools: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GoldenRef:
    """The golden vectors: their file in the bundle and the kernel sets over which the tolerance was measured."""

    file: str
    digest: str
    samples: int
    kernel_sets: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class BundleConfig:
    """The configuration of a bundle.

    Attributes:
        name, version: the model's name and its release's version.
        target, backend: where and how the model runs.
        entry: the file that the runtime opens; the bundle's other files lie beside it.
        precision: ``int8``, ``float16`` or ``float32``, from the host's plan.
        runtimes: the runtimes that can run the bundle, in order of preference.
        runtime_options: passed to the backend's runtime unchanged (threads, hints).
        labels: the class names, in the order of the output's last axis.
        states: the states of a stateful model.
        generation: the configuration of a model that generates text; None for all others.
        pipeline: the pipeline from raw data to an answer; None if the caller passes tensors.
        drift: the distribution of inputs, outputs and confidence over evaluation samples; None if it was not measured.
    """

    schema_version: int
    name: str
    version: str
    target: str
    backend: str
    entry: str
    precision: str
    runtimes: tuple[RuntimeRequirement, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    metric: Metric
    resources: Resources
    provenance: Provenance
    verified: Verified
    golden: GoldenRef
    labels: tuple[str, ...] = ()
    states: tuple[State, ...] = ()
    pipeline: Pipeline | None = None
    runtime_options: dict[str, Any] = field(default_factory=dict)
    generation: Generation | None = None
    drift: tuple[Stream, ...] | None = None

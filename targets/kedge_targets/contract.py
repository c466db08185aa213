"""The contract between Kedge and a backend.

A backend is one folder below ``kedge_targets.backends``: ``compiler.py`` with a class ``Compiler`` (host),
``runtime.py`` with a class ``Runtime`` (device and host), and ``toolchain/`` where it needs an isolated environment.
Neither module imports its vendor's packages at its top; only methods do. A backend turns every failure of its vendor
into one of Kedge's errors.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import BundleConfig, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import VerificationError

if TYPE_CHECKING:
    from kedge_targets.decoder.contract import DecoderCompiler
    from kedge_targets.decoder.session import DecoderSession
    from kedge_targets.decoder.stages import Stage
    from kedge_targets.numerics import Numerics, Plan, QuantizationScheme
    from kedge_targets.target import Target
    from kedge_targets.true_precision import Numbers
    from kedge_targets.worker.progress import Progress

__all__ = ["Calibration", "Compiler", "Estimate", "LayerCost", "Lowered", "Runtime", "Session", "Way"]

Array = npt.NDArray[np.generic]


class Calibration(Protocol):
    """Calibration samples as a stream. Each item is a batch of one sample, input name → array in the form that the
    model takes (preprocessed, float32 unless the input is an integer)."""

    @property
    def samples(self) -> int:
        """How many samples there are."""

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """Iterate from the first sample. It may be called repeatedly."""


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """The cost of one layer on the device, estimated by the vendor's tools.

    Attributes:
        cycles: of the device's clock for one sample; None where the tools do not tell.
        resources: name → count (``LUT``, ``BRAM_18K``, ``DSP``).
    """

    name: str
    cycles: int | None = None
    resources: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Performance on the device, estimated by the vendor's tools, not measured.

    Attributes:
        source: who says so, with version.
        latency_ms: of one sample.
        frames_per_second: at full load.
        clock_mhz: that both are for.
        layers: in the order of the data.
        capacity: resource → what the device has; empty where that is not known.
    """

    source: str
    latency_ms: float
    frames_per_second: float
    clock_mhz: float | None = None
    layers: tuple[LayerCost, ...] = ()
    capacity: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """The result of :meth:`Compiler.lower`.

    Attributes:
        files: title → path of each file that the device needs.
        entry: title of the one that the runtime opens.
        inputs, outputs: in the trained model's order; ``file`` says what the file really has.
        runtimes: any of these runs it.
        runtime_options: for :meth:`Runtime.load` (threads, hints).
        verified: how far the host can prove it (``EXECUTED`` where the device's runtime runs on the host).
        tools: name → version of what made it.
        seconds: spans worth measuring, e.g. ``quantize``.
        notes: what the reader of the report should know.
        calibration_samples: really used.
        estimate: of the device's speed, where running here tells nothing of it.
        precision: what the file's numbers are, where the graph itself and not the plan decided it (``w1a2``).
        floating: names of layers that stay in float though the plan does not name them; ``notes`` say why.
    """

    files: dict[str, Path]
    entry: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    runtimes: tuple[RuntimeRequirement, ...]
    verified: Verified
    tools: dict[str, str]
    runtime_options: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    calibration_samples: int = 0
    estimate: Estimate | None = None
    precision: str = ""
    floating: tuple[str, ...] = ()


class Compiler(abc.ABC):
    """The host's half of a backend."""

    requirements: frozenset[str] = frozenset()
    """Options of :meth:`lower` that a user may give for one compilation, over the target's own (``target_fps``)."""

    reference: bool = False
    """Whether its float32 is what the host runs the float model with, so that nothing need be lowered to compare with
    float."""

    texts: bool = False
    """Whether its files take tensors of texts."""

    @property
    @abc.abstractmethod
    def numerics(self) -> Numerics:
        """The numerics that the backend supports."""

    @abc.abstractmethod
    def missing(self) -> str | None:
        """Return what must be installed before :meth:`lower` works, with the command; None if nothing is missing."""

    def verification(self, target: Target) -> Verified:
        """How far :meth:`lower` can prove this target's files on this host, once nothing is :meth:`missing`: the least
        that may be claimed, unless the backend knows better."""
        return Verified.CHECKED

    @abc.abstractmethod
    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """Return the int8 schemes that are safe and fast on this target's processor, best first."""

    @abc.abstractmethod
    def lower(
        self,
        graph: Path,
        plan: Plan,
        calibration: Calibration,
        *,
        target: Target,
        options: Mapping[str, Any],
        workdir: Path,
    ) -> Lowered:
        """Turn an ONNX graph into this backend's files.

        Args:
            graph: a checked ONNX file with shapes inferred; it is not changed.
            plan: precision by layer.
            calibration: used where the plan has int8.
            target: the device.
            options: of this backend in the target's file, and those of :attr:`requirements` that were asked for.
            workdir: an empty folder that outlives the call.

        Raises:
            UnsupportedOperatorError: names the operator and its node.
            ToolchainError: its toolchain is not installed.
            LoweringError: all else, with the vendor's own words.
        """

    no_decoders: str = "this backend runs no language models"
    """Why :meth:`decoders` is None, in words."""

    def decoders(self) -> DecoderCompiler | None:
        """The lowering of decoder language models; None if the backend has none."""
        return None

    def numbers(self, files: Mapping[str, Path], shapes: Mapping[str, Sequence[int]]) -> Numbers | None:
        """Return the number formats in these files, counted in the files themselves; None if they cannot be counted.

        Args:
            files: of :meth:`lower`.
            shapes: input, by the file's name → shape of one sample, batch included.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of running calls.

    Attributes:
        options: for :meth:`Runtime.load`, over the bundle's own.
        calls: that run at the same time: with the threads of each they take no more than the cores.
    """

    options: Mapping[str, Any]
    calls: int


class Session(abc.ABC):
    """A loaded model. Not safe for two threads at once unless ``concurrent``."""

    concurrent: bool = False
    detail: str = ""
    """Description of what runs the model here (``… on the CPU, because …``), shown in the status; empty if the
    runtime's name says it all."""
    figures: Mapping[str, float] = {}
    """Figures measured once on this device (``samples_per_second``), shown in telemetry."""

    @abc.abstractmethod
    def run(self, inputs: list[Array]) -> list[Array]:
        """Run once: arrays as the file takes them, in the file's order (``FileTensor.index``); likewise back.
        What comes back is the caller's own: the next run does not write over it."""

    def close(self) -> None:
        """Release the session's resources."""


class Runtime(abc.ABC):
    """The device's half of a backend."""

    distributions: tuple[str, ...]
    """Distributions that can run the files, in order of preference."""

    exact: bool = False
    """Whether every kernel set and the device compute identical numbers, so that golden vectors allow no deviation."""

    @property
    @abc.abstractmethod
    def kernel_sets(self) -> tuple[str, ...]:
        """Kernel sets that a device may use for the same file; the first is the default of :meth:`load`."""

    def kernel_sets_for(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the :attr:`kernel_sets` that a device with these options may use; tolerances are measured over
        them."""
        return self.kernel_sets

    def prepare(self, folder: Path, config: BundleConfig, *, cache: Path, progress: Progress) -> Mapping[str, Any]:
        """Do the one-time work of this device before it can load a bundle (build, measure), and keep the result.

        Args:
            folder: holds the bundle's files by title, the golden vectors among them.
            config: of the bundle.
            cache: a folder that outlives the call; made where it is missing.
            progress: is told how far it is.

        Returns:
            Options for :meth:`load`, over the bundle's own.
        """
        return {}

    def ways(self, options: Mapping[str, Any], cores: int) -> tuple[Way, ...]:
        """Return the ways of running calls that are worth comparing on this device, the ones that keep fewest cores
        busy first; empty where there is nothing to choose.

        Args:
            options: as :meth:`load` would get them otherwise.
            cores: that may be used.
        """
        return ()

    @abc.abstractmethod
    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session:
        """Open a model's file.

        Raises:
            MissingDependencyError: no runtime is installed.
            VerificationError: the runtime refuses the file, with its own reason.
        """

    def load_decoder(
        self, entry: Path, options: Mapping[str, Any], *, slots: int, context: int, kernel_set: str | None = None
    ) -> DecoderSession:
        """Open a decoder's file, with caches for ``slots`` sequences of ``context`` positions.

        Raises:
            InputError: the caches do not fit into memory.
            VerificationError: the runtime refuses the file, or takes no decoders.
        """
        raise VerificationError("this backend runs no language models", where=entry.name)

    def load_stage(
        self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None
    ) -> Callable[[int, int], Stage]:
        """Open a file with some of a decoder's layers.

        Returns:
            Makes a stage of ``(slots, context)``; all that it makes share the weights, and run in turns.

        Raises:
            VerificationError: see :meth:`load_decoder`.
        """
        raise VerificationError("this backend runs no parts of language models", where=entry.name)

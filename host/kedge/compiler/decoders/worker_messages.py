"""Messages to and from the worker that compiles a decoder: plain data, JSON on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedge.compiler.decoders.budget import Budget
from kedge.evaluation.decoders.choices import ChoiceFigures
from kedge.evaluation.decoders.figures import Figures
from kedge.quantization.decoder_scheme import Scheme
from kedge.search.candidate import StepChoice
from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_protocol.bundle.generation import Generation


@dataclass(frozen=True, kw_only=True)
class DecoderStepEntry:
    """A step that was run, and the float decoder after it.

    Attributes:
        parameters: number of weights after the step.
        figures: of the decoder after the step, in float.
        measured: what the step itself measured.
    """

    use: str
    options: dict[str, Any]
    parameters: int
    figures: Figures
    seconds: float
    measured: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class BackendPace:
    """The pace of the packed decoder on one backend, measured in turns with the others.

    Attributes:
        read_per_second, written_per_second: tokens of all slots together, of the least disturbed round.
        ratio: time of an exchange as a multiple of the first backend's, with its interval ``low`` to ``high``; above 1
            is slower.
        busy: whether the ratio is of processor time, because the machine was at other work.
        refused: why the backend could not be chosen, in words; empty if it could.
    """

    backend: str
    read_per_second: float = 0.0
    written_per_second: float = 0.0
    ratio: float = 1.0
    low: float = 1.0
    high: float = 1.0
    busy: bool = False
    refused: str = ""

    @property
    def said(self) -> str:
        """Return the pace in words."""
        if self.refused:
            return f"{self.backend} not taken: {self.refused}"
        speeds = f"reads {self.read_per_second:.3g} and writes {self.written_per_second:.3g} tokens a second"
        return f"{self.backend} {speeds}, an exchange takes {self.ratio:.3g}× ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True, kw_only=True)
class Rival:
    """Another backend of the target, with the options of its runtime: the faster one is packed."""

    backend: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DecoderRequest:
    """A request to compile one decoder for one backend.

    Attributes:
        source, adapter, calibration, evaluation: absolute paths.
        options: options of the backend's runtime.
        rivals: backends that the decoder is packed for too, to take the faster one.
        context, slots: the requested ones; with context None the model's own, up to :data:`CONTEXT`.
        schemes: tried in order until one keeps the budget.
        memory_bytes: the target's memory.
        workdir: an empty folder that outlives the call.
        steps: over the float decoder, in this order.
        teacher: absolute path of the model that one of them names as its teacher.
        stepped: a folder that all targets share, for the decoder after the steps.
        learned: a folder that all targets share, for layers that were learned from calibration; empty where they share
            none.
        seed: of everything random in the steps.
        split: memory of each device that gets a part, in bytes; empty for a model that stays whole.
        choices: absolute path of multiple-choice questions, if there are any.
    """

    source: str
    adapter: str | None = None
    calibration: str
    evaluation: str
    backend: str
    options: dict[str, Any]
    context: int | None = None
    slots: int
    schemes: tuple[Scheme, ...]
    budget: Budget
    memory_bytes: int
    workdir: str
    steps: tuple[StepChoice, ...] = ()
    teacher: str | None = None
    stepped: str = ""
    learned: str = ""
    seed: int = 0
    split: tuple[int, ...] = ()
    rivals: tuple[Rival, ...] = ()
    choices: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """A scheme that was tried on a backend, and its figures.

    Attributes:
        bytes: of its files.
        memory_bytes: of files and caches.
        broken: which limits of the budget it exceeds; empty if none.
        outgrown: whether one of them is of bytes: schemes with more bits are larger still.
        slow: whether it is only too slow.
    """

    scheme: Scheme
    label: str
    bytes: int
    memory_bytes: int
    figures: Figures
    broken: str
    outgrown: bool
    seconds: float
    backend: str = ""
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class PartAnswer:
    """One part of a decoder that is split; see :class:`DecoderAnswer`.

    Attributes:
        bytes: of its files.
        layers: its first layer, and the one after its last.
        position_bytes, window_bytes: see :class:`kedge_protocol.bundle.generation.Generation`.
        memory_bytes: of files and caches.
    """

    files: dict[str, str]
    entry: str
    runtimes: tuple[RuntimeRequirement, ...]
    golden: str
    layers: tuple[int, int]
    bytes: int
    position_bytes: int
    window_bytes: int
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class DecoderAnswer:
    """The result of compiling a decoder.

    Attributes:
        backend: which of the requested ones was packed.
        files: title → path of all files that the device needs, including those of the text side.
        chosen: index of the attempt with these files: the first that keeps the budget; -1, the last, if none does.
        memory_bytes: memory of files and caches.
        steps: what was done to the float decoder before.
        parts: the parts of a decoder that is split; ``files`` then are those of the text side, and ``golden`` are the
            vectors of all parts together.
        channels: of the hidden states between them.
        paces: of the backends that were compared; empty where there was one.
        written_per_second: tokens of one sequence; None unless the budget has a limit of it.
        choices: of the packed decoder; None if no questions were given.
    """

    backend: str
    files: dict[str, str]
    entry: str
    runtimes: tuple[RuntimeRequirement, ...]
    tools: dict[str, str]
    generation: Generation
    attempts: tuple[Attempt, ...]
    chosen: int
    golden: str
    golden_vectors: int
    kernel_sets: tuple[str, ...]
    source_digest: str
    source_bytes: int
    calibration_digest: str
    evaluation_digest: str
    calibration_sequences: int
    evaluation_sequences: int
    runtime: str
    memory_bytes: int
    warnings: tuple[str, ...] = field(default_factory=tuple)
    steps: tuple[DecoderStepEntry, ...] = ()
    parts: tuple[PartAnswer, ...] = ()
    channels: int = 0
    paces: tuple[BackendPace, ...] = ()
    written_per_second: float | None = None
    choices: ChoiceFigures | None = None


CONTEXT = 4096
"""Largest default context; a longer one must be requested."""

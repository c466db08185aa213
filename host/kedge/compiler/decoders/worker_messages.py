"""What goes to the worker and back when a decoder is compiled: plain data, JSON on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedge.evaluation.decoders.figures import Figures
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_protocol.bundle.generation import Generation


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What compression may cost.

    Attributes:
        max_ratio: perplexity over the float model's.
        max_perplexity: perplexity itself.
        max_kl: nats a token.
    """

    max_ratio: float | None = None
    max_perplexity: float | None = None
    max_kl: float | None = None

    def broken(self, figures: Figures) -> str:
        """What is beyond it, in words; empty where all is kept."""
        checks = (
            ("perplexity ×", figures.ratio, self.max_ratio),
            ("perplexity", figures.perplexity, self.max_perplexity),
            ("KL", figures.kl, self.max_kl),
        )
        over = [
            f"{name} {value:.4g} is over {most:.4g}"
            for name, value, most in checks
            if most is not None and value > most
        ]
        return ", ".join(over)


@dataclass(frozen=True, kw_only=True)
class DecoderRequest:
    """Compile one decoder for one backend.

    Attributes:
        source, adapter, calibration, evaluation: absolute paths.
        options: for the backend's runtime.
        context, slots: asked for; context None: the model's own, up to :data:`CONTEXT`.
        schemes: tried in order until one keeps the budget.
        memory_bytes: of the target.
        workdir: an empty folder that outlives the call.
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


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One scheme that was tried."""

    scheme: Scheme
    label: str
    bytes: int
    figures: Figures
    broken: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DecoderAnswer:
    """What was made.

    Attributes:
        files: title → path of all that the device needs, the text's files among them.
        chosen: index of the attempt whose files these are: the first that keeps the budget, else the last.
        memory_bytes: of files and caches.
    """

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


CONTEXT = 4096
"""Positions that a bundle has room for where none is asked for and the model has more."""

"""The report of a compiled decoder: ``generation.json`` beside the release."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from kedge.compiler.decoders.worker_messages import Attempt, BackendPace, DecoderAnswer, DecoderStepEntry
from kedge.evaluation.decoders.choices import ChoiceFigures
from kedge_protocol import codec
from kedge_protocol.errors import BundleError, MessageError

FILE = "generation.json"


@dataclass(frozen=True, kw_only=True)
class DecoderEntry:
    """The report of one target.

    Attributes:
        chosen: index of the attempt that was packed.
        bytes: size of the files that the runtime opens.
        memory_bytes: memory of files and caches.
        position_bytes, window_bytes: see :class:`kedge_protocol.bundle.generation.Generation`.
        steps: what was done to the float decoder before it was quantized.
        layers: the first layer of a part, and the one after its last; None for a whole decoder.
        paces: of the backends that were compared, the target's first one first; empty where there was one.
        written_per_second: tokens of one sequence; None unless the budget has a limit of it.
        choices: of multiple-choice questions; None if none were given.
    """

    target: str
    backend: str
    digest: str
    chosen: int
    attempts: tuple[Attempt, ...]
    bytes: int
    memory_bytes: int
    context: int
    slots: int
    position_bytes: int
    window_bytes: int = 0
    steps: tuple[DecoderStepEntry, ...] = ()
    layers: tuple[int, int] | None = None
    paces: tuple[BackendPace, ...] = ()
    written_per_second: float | None = None
    choices: ChoiceFigures | None = None

    @property
    def attempt(self) -> Attempt:
        """Return the attempt that was packed."""
        return self.attempts[self.chosen]


@dataclass(frozen=True, kw_only=True)
class DecoderReport:
    """The report of all targets of a release."""

    name: str
    version: str
    source_bytes: int
    targets: tuple[DecoderEntry, ...]
    warnings: tuple[str, ...] = ()
    failures: dict[str, str] | None = None


def entry(answer: DecoderAnswer, target: str, digest: str) -> DecoderEntry:
    """Return the report of a target whose bundle has this digest."""
    return DecoderEntry(
        target=target,
        backend=answer.backend,
        digest=digest,
        chosen=answer.chosen,
        attempts=answer.attempts,
        bytes=answer.attempts[answer.chosen].bytes,
        memory_bytes=answer.memory_bytes,
        context=answer.generation.context,
        slots=answer.generation.slots,
        position_bytes=answer.generation.position_bytes,
        window_bytes=answer.generation.window_bytes,
        steps=answer.steps,
        paces=answer.paces,
        written_per_second=answer.written_per_second,
        choices=answer.choices,
    )


def write(report: DecoderReport, folder: Path) -> None:
    """Write the report into a release's folder."""
    text = json.dumps(codec.unstructure(report), indent=1, sort_keys=True)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> DecoderReport | None:
    """Return the report of a release, or None if there is none.

    Raises:
        BundleError: the report is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        return codec.decode(path.read_bytes(), DecoderReport, where=str(path))
    except MessageError as error:
        raise BundleError(error.what, where=str(path)) from error

"""What a backend that takes decoders offers the host; the device's half is
:meth:`kedge_targets.contract.Runtime.load_decoder`."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path

from kedge_protocol.bundle.config import RuntimeRequirement
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.matrix import Matrix
from kedge_targets.decoder.plan import Piece, Pieces
from kedge_targets.decoder.spec import Array, DecoderSpec


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What stands before and after the layers.

    Attributes:
        embedding: float or codes [vocabulary, hidden].
        positions: learned ones, float32 [context, hidden]; None where heads turn.
        norm: the last norm, ``norm`` and maybe ``norm.bias``.
        head: None where it is the embedding.
    """

    embedding: Matrix
    positions: Array | None
    norm: dict[str, Array]
    head: Matrix | None


@dataclass(frozen=True, kw_only=True)
class LoweredDecoder:
    """What :meth:`DecoderCompiler.lower` made: as :class:`kedge_targets.contract.Lowered`, and the bytes of all caches
    for one position."""

    files: dict[str, Path]
    entry: str
    runtimes: tuple[RuntimeRequirement, ...]
    tools: dict[str, str]
    position_bytes: int


class LayerRunner(abc.ABC):
    """One layer in float32, alone: what comes in goes out as the next layer's input."""

    @abc.abstractmethod
    def run(self, hidden: Array) -> tuple[Array, dict[str, Array]]:
        """Run one sequence from its first position.

        Args:
            hidden: float32 [positions, channels].

        Returns:
            The next layer's ``hidden``, and each probe's values float32 [positions, channels]
            (:data:`kedge_targets.decoder.plan.PROBES`).
        """


class DecoderCompiler(abc.ABC):
    """The host's half for decoders."""

    @abc.abstractmethod
    def layout(self, spec: DecoderSpec) -> HeadLayout:
        """How its kernels want a head's channels; every :class:`Piece` comes in this layout."""

    @abc.abstractmethod
    def groups(self, columns: int) -> tuple[int, ...]:
        """Sizes of groups in which a matrix of so many input channels can be stored in codes, smallest first."""

    @abc.abstractmethod
    def lower(self, spec: DecoderSpec, ends: Ends, pieces: Pieces, *, context: int, workdir: Path) -> LoweredDecoder:
        """Write a decoder's files; ``pieces`` is asked for one layer after the other.

        Raises:
            LoweringError: with the vendor's own words.
        """

    @abc.abstractmethod
    def layer_runner(self, spec: DecoderSpec, index: int, piece: Piece, *, context: int) -> LayerRunner:
        """One layer for calibration and for the float reference.

        Raises:
            LoweringError: with the vendor's own words.
        """

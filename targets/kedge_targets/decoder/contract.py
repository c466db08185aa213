"""The contract of a backend's compiler for decoders on the host; its counterpart on the device is
:meth:`kedge_targets.contract.Runtime.load_decoder`."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedge_protocol.bundle.config import RuntimeRequirement, Verified
from kedge_protocol.errors import LoweringError
from kedge_targets.decoder.exported import ExportedSpec
from kedge_targets.decoder.layout import HeadLayout
from kedge_targets.decoder.matrix import Codes, Matrix
from kedge_targets.decoder.plan import Piece, Pieces
from kedge_targets.decoder.spec import Array, DecoderSpec, LayerKind

DECODERS, ENCODER_DECODERS, EXPORTED, PARTS = "decoders", "encoder-decoders", "exported decoders", "parts of decoders"
"""The kinds of models that generate."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """The parts of a decoder before and after its layers.

    Attributes:
        embedding: float or codes [vocabulary, hidden].
        positions: learned position embeddings, float32 [context, hidden]; None with rotary embedding.
        norm: tensors of the last norm, ``norm`` and optionally ``norm.bias``; empty if there is none.
        head: the head's matrix; None if it is the embedding.
        head_bias: float32 [vocabulary]; None for none.
        relative: biases by distance, float32 [buckets, heads]; None for none.
    """

    embedding: Matrix
    positions: Array | None
    norm: dict[str, Array]
    head: Matrix | None
    head_bias: Array | None = None
    relative: Array | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderParts:
    """An encoder's weights as they are stored.

    Attributes:
        embedding: of the tokens; None for a sound.
        positions: float32 [context, hidden]; None for none.
        norm: see :class:`Ends`.
        relative: see :class:`Ends`.
        convolutions: ``first``, ``first.bias``, ``second`` and ``second.bias`` of a sound; empty for a text.
        pieces: the layers; their heads have the model's own layout.
    """

    embedding: Matrix | None
    positions: Array | None
    norm: dict[str, Array]
    relative: Array | None
    convolutions: dict[str, Array]
    pieces: Pieces


@dataclass(frozen=True, kw_only=True)
class LoweredDecoder:
    """The result of :meth:`DecoderCompiler.lower`: like :class:`kedge_targets.contract.Lowered`, with the bytes of all
    caches for one position, and of the encoder's keys and values for one of its positions.

    Attributes:
        window_bytes: of a slot's caches that hold a window, and do not grow with the context.
        parts: the parts of a decoder that is split; ``files`` then are those of all parts.
        layers: of a part: its first layer, and the one after its last.
    """

    files: dict[str, Path]
    entry: str
    runtimes: tuple[RuntimeRequirement, ...]
    tools: dict[str, str]
    position_bytes: int
    source_position_bytes: int = 0
    window_bytes: int = 0
    parts: tuple[LoweredDecoder, ...] = ()
    layers: tuple[int, int] = (0, 0)


class LayerRunner(abc.ABC):
    """A single layer in float32: maps its input to the next layer's input."""

    @abc.abstractmethod
    def run(self, hidden: Array) -> tuple[Array, dict[str, Array]]:
        """Run one sequence from its first position.

        Args:
            hidden: float32 [positions, channels].

        Returns:
            The next layer's ``hidden``, and each probe's values float32 [positions, channels]
            (:data:`kedge_targets.decoder.plan.PROBES`).
        """

    @abc.abstractmethod
    def cached(self, hidden: Array) -> tuple[Array, Array]:
        """Return the keys (already rotated) and values that the layer stores for one sequence.

        Returns:
            Two times float32 [kv heads, positions, head size], with the kernel's head layout.
        """


class DecoderCompiler(abc.ABC):
    """A backend's compiler for decoders.

    Attributes:
        verified: how far the host proves the files that :meth:`lower` writes.
        cache_itemsize: bytes of a stored key or value that is not rounded.
        margin: how many times as far as the host's kernel sets from each other the device's kernels may be from them.
    """

    verified = Verified.EXECUTED
    cache_itemsize = 4
    margin = 1.0

    def objection(self, kind: str, options: Mapping[str, Any]) -> str:
        """Return why a target cannot run this kind of model (:data:`DECODERS` and so on) with this backend, in words;
        empty if it can.

        Args:
            options: of the backend in the target's file.
        """
        return ""

    def objection_to(self, precision: str, cache: str) -> str:
        """Return why the kernels do not take layers of this precision, or keys and values stored in this one, in words;
        empty if they do. ``float32`` of a cache is what the layers compute in."""
        return ""

    @abc.abstractmethod
    def layout(self, spec: DecoderSpec) -> HeadLayout:
        """Return the layout of a head's channels that the kernels need; every :class:`Piece` has this layout."""

    @abc.abstractmethod
    def groups(self, columns: int) -> tuple[int, ...]:
        """Return the group sizes in which a matrix with ``columns`` input channels can be stored as codes, smallest
        first."""

    def cache_positions(self, kind: LayerKind, context: int) -> int:
        """Return the positions that a layer's cache holds."""
        return context

    @abc.abstractmethod
    def lower(self, spec: DecoderSpec, ends: Ends, pieces: Pieces, *, context: int, workdir: Path) -> LoweredDecoder:
        """Write a decoder's files; ``pieces`` is called for one layer after the other.

        Raises:
            LoweringError: the vendor's tool refuses it; the message quotes it.
        """

    def lower_parts(
        self, spec: DecoderSpec, ends: Ends, pieces: Pieces, cuts: Sequence[int], *, context: int, workdir: Path
    ) -> tuple[LoweredDecoder, ...]:
        """Write a decoder's files in parts for several devices; see :meth:`lower`. The first part also holds embedding,
        norm and head. Together the parts compute the same numbers as the whole.

        Args:
            cuts: the first layer of each part after the first.

        Raises:
            LoweringError: this backend makes none, or the vendor's tool refuses it.
        """
        raise LoweringError("this backend makes no parts of a decoder", where=spec.architecture)

    def lower_with_encoder(
        self, spec: DecoderSpec, ends: Ends, pieces: Pieces, encoder: EncoderParts, *, context: int, workdir: Path
    ) -> LoweredDecoder:
        """Write the files of an encoder and its decoder; see :meth:`lower`.

        Raises:
            LoweringError: this backend takes none, or the vendor's tool refuses it.
        """
        raise LoweringError("this backend runs no encoder-decoders", where=spec.architecture)

    def lower_exported(
        self, source: Path, spec: ExportedSpec, rounded: Callable[[Array], Codes] | None, *, workdir: Path
    ) -> LoweredDecoder:
        """Write the files of a decoder that was exported to ONNX.

        Args:
            rounded: rounds a matrix float32 [out, in]; None to keep the weights as they are.

        Raises:
            LoweringError: this backend takes none, or the vendor's tool refuses it.
        """
        raise LoweringError("this backend runs no exported decoders", where=source.name)

    @abc.abstractmethod
    def layer_runner(self, spec: DecoderSpec, index: int, piece: Piece, *, context: int) -> LayerRunner:
        """Return a runner of one layer for calibration and for the float reference.

        Raises:
            LoweringError: the vendor's tool refuses it; the message quotes it.
        """

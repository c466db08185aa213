"""Stores an encoder-decoder by a scheme: each matrix is rounded by itself when its layer is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kedge.importing.decoders.decoder import EncoderWeights
from kedge.quantization.decoder_layers import Heard, stored, table
from kedge.quantization.decoder_scheme import Scheme
from kedge_targets.decoder import layout as layouts
from kedge_targets.decoder import rounding
from kedge_targets.decoder.contract import DecoderCompiler, EncoderParts, Ends, LoweredDecoder
from kedge_targets.decoder.matrix import Matrix
from kedge_targets.decoder.plan import Piece
from kedge_targets.decoder.rounding import Grid
from kedge_targets.decoder.spec import SOUND, Array, DecoderSpec

_CONVOLUTIONS = ("first", "first.bias", "second", "second.bias")


def lowered(
    spec: DecoderSpec,
    weights: EncoderWeights,
    compiler: DecoderCompiler,
    scheme: Scheme,
    *,
    context: int,
    workdir: Path,
    heard: Heard = lambda done, total: None,
) -> LoweredDecoder:
    """Write an encoder-decoder's files.

    Args:
        heard: called before each layer of both parts.

    Raises:
        LoweringError: the backend takes none, or the vendor's tool refuses it.
    """
    encoder = spec.encoder
    if encoder is None:
        raise ValueError("no encoder")
    total = encoder.layers + len(spec.layers)

    def listener(index: int) -> Piece:
        heard(index, total)
        return _piece(weights.encoder_layer(index), scheme, index)

    def writer(index: int) -> Piece:
        heard(encoder.layers + index, total)
        layer = layouts.arranged(spec, compiler.layout(spec), weights.layer(index))
        return _piece(layer, scheme, encoder.layers + index)

    ends, parts = _ends(spec, weights, scheme), _parts(spec, weights, scheme, listener)
    return compiler.lower_with_encoder(spec, ends, writer, parts, context=context, workdir=workdir)


def _piece(layer: dict[str, Array], scheme: Scheme, index: int) -> Piece:
    bits = scheme.bits_of(index)
    grid = Grid(bits=bits, group=scheme.group, symmetric=scheme.symmetric)

    def made(matrix: Array) -> Matrix:
        return rounding.plain(matrix, grid, search=bits == 4) if bits else stored(matrix, scheme.precision)

    return Piece(
        matrices={name: made(tensor) for name, tensor in layer.items() if tensor.ndim == 2},
        vectors={name: tensor for name, tensor in layer.items() if tensor.ndim == 1},
    )


def _ends(spec: DecoderSpec, weights: EncoderWeights, scheme: Scheme) -> Ends:
    return Ends(
        embedding=table(weights.outer("embedding"), scheme),
        positions=weights.outer("positions") if spec.learned_positions else None,
        norm=_norm(weights, "norm"),
        head=None if spec.tied else table(weights.outer("head"), scheme),
        head_bias=weights.outer("head.bias") if spec.head_bias else None,
        relative=weights.outer("relative") if spec.relative is not None else None,
    )


def _parts(spec: DecoderSpec, weights: EncoderWeights, scheme: Scheme, pieces: Callable[[int], Piece]) -> EncoderParts:
    encoder = spec.encoder
    sound = encoder is not None and encoder.kind == SOUND
    embedding = None
    if not sound:
        own = "encoder.embedding" if encoder is not None and encoder.own_embedding else "embedding"
        embedding = table(weights.outer(own), scheme)
    return EncoderParts(
        embedding=embedding,
        positions=weights.outer("encoder.positions") if spec.learned_positions else None,
        norm=_norm(weights, "encoder.norm"),
        relative=weights.outer("encoder.relative") if spec.relative is not None else None,
        convolutions={name: weights.outer(name) for name in _CONVOLUTIONS} if sound else {},
        pieces=pieces,
    )


def _norm(weights: EncoderWeights, name: str) -> dict[str, Array]:
    """Return a last norm's tensors by the names ``norm`` and ``norm.bias``."""
    there = [end for end in ("", ".bias") if weights.has(name + end)]
    return {"norm" + end: weights.outer(name + end) for end in there}

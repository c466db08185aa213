"""What is checked before the long work of compiling a decoder."""

from __future__ import annotations

from kedge.compiler.decoders.worker_messages import DecoderRequest
from kedge.compiler.decoders.worker_parts import COPIES
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.errors import BudgetError, ConfigError, TargetError

_LESS = "ask for less with --context, --slots or --cache int8, or take a smaller model"


def layers(request: DecoderRequest, count: int) -> None:
    """Raise :class:`ConfigError` if a scheme names layers that the model does not have."""
    for scheme in request.schemes:
        if any(index >= count for index in scheme.int8_layers):
            raise ConfigError(
                f"layer {max(scheme.int8_layers)} is not among the model's {count}",
                where="--quantize",
                remedy=f"Give int8_layers from 0 to {count - 1}",
            )


def memory(request: DecoderRequest, scheme: Scheme, *, context: int, weights: int, cache: int, source: int) -> None:
    """Check that the smallest scheme and the caches fit into the target's memory and the budget.

    Args:
        weights, cache: their bytes, at least.
        source: bytes of the user's files.

    Raises:
        TargetError: the target has too little memory.
        BudgetError: the budget allows less.
    """
    held = COPIES * weights
    if held + cache > request.memory_bytes:
        raise TargetError(
            f"the weights take {held >> 20} MiB of memory at least and the caches of {request.slots} x {context} "
            f"positions {cache >> 20} MiB; the target has {request.memory_bytes >> 20} MiB",
            where=request.source,
            remedy=_LESS.capitalize(),
        )
    if outgrown := request.budget.outgrown(size=weights, memory=held + cache, source=source):
        raise BudgetError(f"{outgrown} in {scheme.label} already", where=request.source, remedy=f"Allow more, {_LESS}")


def warnings(
    calibration: list[list[int]], evaluation: list[list[int]], same: bool, decoder: Decoder, *, few: int
) -> tuple[str, ...]:
    """Return what is doubtful about the texts and the model.

    Args:
        same: whether both are the same texts.
        few: fewer tokens are too few.
    """
    found = []
    if same:
        found.append("calibration and evaluation are the same texts: the figures are too good")
    for name, sequences in (("calibration", calibration), ("evaluation", evaluation)):
        tokens = sum(map(len, sequences))
        if tokens < few:
            found.append(f"only {tokens} tokens of {name} text: figures are guesswork; some thousand are usual")
    if not decoder.text.end_tokens:
        found.append("the folder names no token that ends an answer: only the limit of tokens will")
    return tuple(found)

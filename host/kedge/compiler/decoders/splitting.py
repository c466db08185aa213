"""Decides which layers of a decoder each of several devices gets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.bundle.write import check_place
from kedge_protocol.errors import ConfigError, StorageError, TargetError
from kedge_protocol.topics import checked_name
from kedge_targets.decoder.contract import DECODERS
from kedge_targets.decoder.spec import DecoderSpec
from kedge_targets.target import Target

WHERE = "--split"


def part_name(name: str, index: int) -> str:
    """Return the name in the fleet of a part, from 0 on: the first has the model's own."""
    return name if index == 0 else f"{name}-part-{index + 1}"


def part_folder(out: Path, index: int) -> Path:
    """Return the folder of a part's release."""
    return out / f"part-{index + 1}"


def devices(count: int, asked: Sequence[Target], *, kind: str) -> tuple[Target, ...]:
    """Return the target of each part.

    Args:
        kind: what the model is (:data:`kedge_targets.decoder.contract.DECODERS` and so on).

    Raises:
        ConfigError: there is nothing to split, or the targets are not one, or one for each part.
    """
    if kind != DECODERS:
        raise ConfigError(f"is not for {kind}", where=WHERE, remedy="Leave it out")
    if len(asked) not in (1, count):
        raise ConfigError(
            f"{count} parts for {len(asked)} targets",
            where=WHERE,
            remedy="Give one --target for all parts, or one for each in order",
        )
    return tuple(asked) * (count if len(asked) == 1 else 1)


def check_places(name: str, out: Path, count: int, *, replace: bool) -> None:
    """Check the names of the parts, and that their releases may be written.

    Raises:
        ConfigError: the name leaves no room for the number of a part.
        StorageError: something else is there.
    """
    if (out / "oci-layout").exists() or (out.exists() and not out.is_dir()):
        raise StorageError("is a release or a file", where=str(out), remedy="Choose another folder for the parts")
    for index in range(count):
        checked_name(part_name(name, index), "name of a part")
        check_place(part_folder(out, index), replace=replace)


def cuts(
    spec: DecoderSpec, scheme: Scheme, memory: Sequence[int], *, caches: Sequence[int], where: str
) -> tuple[int, ...]:
    """Return the first layer of each part after the first, so that the fullest device is as empty as can be.

    Args:
        memory: of each device, bytes.
        caches: bytes of each layer's, of all slots.

    Raises:
        ConfigError: there are more parts than layers.
        TargetError: the parts do not fit.
    """
    layers, parts = len(spec.layers), len(memory)
    if parts > layers:
        raise ConfigError(f"{parts} parts for {layers} layers", where=WHERE, remedy=f"Give at most {layers}")
    sizes = [_layer_bytes(spec, scheme, at) + caches[at] for at in range(layers)]
    ends = spec.vocabulary * spec.hidden * (1 if spec.tied else 2)
    before = int(ends * _bytes_a_weight(scheme.embedding_bits, scheme.embedding, scheme.group))
    # best[end] = the fullest device's share of its memory with the layers up to `end`, and the cuts.
    best: dict[int, tuple[float, tuple[int, ...]]] = {
        end: ((before + sum(sizes[:end])) / memory[0], ()) for end in range(1, layers + 1)
    }
    for size in memory[1:]:
        best = {
            end: min((max(best[cut][0], sum(sizes[cut:end]) / size), (*best[cut][1], cut)) for cut in best if cut < end)
            for end in range(min(best) + 1, layers + 1)
        }
    share, found = best[layers]
    if share > 1:
        raise TargetError(
            f"the fullest of {parts} devices would need {share:.2f} times its memory",
            where=where,
            remedy="Ask for less with --context, --slots or --cache int8, or for more parts with --split",
        )
    return found


def _layer_bytes(spec: DecoderSpec, scheme: Scheme, layer: int) -> int:
    attention = 2 * spec.hidden * spec.head_size * (spec.heads + spec.kv_heads)
    feed_forward = spec.hidden * spec.intermediate * (3 if spec.gated else 2)
    weights = attention + feed_forward
    return int(weights * _bytes_a_weight(scheme.bits_of(layer), scheme.precision, scheme.group))


def _bytes_a_weight(bits: int, precision: str, group: int) -> float:
    """Return the bytes of one weight with its share of scale and zero-point."""
    if bits:
        return (bits + (32 + bits) / group) / 8
    return 2 if precision == "float16" else 4

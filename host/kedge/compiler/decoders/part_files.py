"""The parts of a decoder that is split: lowered together, and each with golden vectors of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from kedge.compiler.decoders.worker_messages import DecoderRequest, PartAnswer
from kedge.compiler.decoders.worker_parts import memory_of, save_vectors, stage_of
from kedge_targets import registry
from kedge_targets.decoder import golden as vectors
from kedge_targets.decoder.contract import LoweredDecoder
from kedge_targets.decoder.spec import Array


def joined(parts: Sequence[LoweredDecoder]) -> LoweredDecoder:
    """Return all parts as one result."""
    return LoweredDecoder(
        files={f"{at}/{title}": path for at, part in enumerate(parts) for title, path in part.files.items()},
        entry="",
        runtimes=parts[0].runtimes,
        tools=parts[0].tools,
        position_bytes=sum(part.position_bytes for part in parts),
        window_bytes=sum(part.window_bytes for part in parts),
        parts=tuple(parts),
    )


def answers(
    request: DecoderRequest, parts: Sequence[LoweredDecoder], tokens: Array, columns: Array, *, context: int
) -> tuple[PartAnswer, ...]:
    """Return the parts with their golden vectors: each part gets what the parts before it gave with the first kernel
    set, so that it is judged alone.

    Args:
        tokens: int64 [vectors, positions]; ``columns`` [vectors, columns] are the tokens whose logits are compared.
    """
    sets = registry.runtime(request.backend).kernel_sets_for(request.options)
    values = tokens
    given: list[dict[str, Array]] = []
    runs: list[list[dict[str, Array]]] = []
    for part in parts:
        given.append({"values": values})
        runs.append([_run(request, part, one, given[-1]) for one in sets])
        values = runs[-1][0]["prefill"]
    # What the last part gives goes to the head, which the first one has.
    given[0] |= {"closing": values, "columns": columns}
    runs[0] = [_run(request, parts[0], one, given[0]) for one in sets]
    found = []
    for at, part in enumerate(parts):
        path = Path(request.workdir) / f"golden-{at}.npz"
        save_vectors(path, given[at], runs[at])
        found.append(
            PartAnswer(
                files={title: str(file) for title, file in part.files.items()},
                entry=part.entry,
                runtimes=part.runtimes,
                golden=str(path),
                layers=part.layers,
                bytes=sum(file.stat().st_size for file in part.files.values()),
                position_bytes=part.position_bytes,
                window_bytes=part.window_bytes,
                memory_bytes=memory_of(part, context, request.slots),
            )
        )
    return tuple(found)


def _run(
    request: DecoderRequest, part: LoweredDecoder, kernel_set: str, given: Mapping[str, Array]
) -> dict[str, Array]:
    with contextlib.closing(stage_of(request, part, context=given["values"].shape[1], kernel_set=kernel_set)) as stage:
        return vectors.stage_answers(stage, given)

"""Golden vectors of a decoder: the logits of forced tokens, computed in one step and in single steps.

Inputs: ``tokens`` int64 [vectors, positions], ``columns`` int64 [vectors, columns] (tokens whose logits are compared;
those of a whole vocabulary would be larger than the model). Outputs: ``prefill`` float32 [vectors, positions, columns]
from one step of all positions, ``steps`` [vectors, positions - prompt, columns] from one step for each position after
the prompt. Of an encoder-decoder there are inputs ``sources`` too, one for each vector: int64 [vectors, length], or
features float16 [vectors, mels, frames].

Of some of a decoder's layers: ``values`` [vectors, positions] (tokens) or [vectors, positions, channels] (hidden
states) → ``prefill`` and ``steps`` as above, hidden states. With the head there are ``closing`` [vectors, positions,
channels] too, what the last layers give, and ``columns`` → ``logits`` [vectors, positions, columns].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import BundleError
from kedge_protocol.golden import Golden
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.stages import Stage

Array = npt.NDArray[Any]

STEPS = 4
"""Number of last positions that are computed one by one."""


def answers(session: DecoderSession, tokens: Array, columns: Array, sources: Array | None = None) -> dict[str, Array]:
    """Return a session's outputs for golden inputs; uses the first slot.

    Raises:
        InputError: a token is outside the vocabulary, or the context has no room for the vectors.
    """
    prefill, steps = [], []
    for at, (row, wanted) in enumerate(zip(tokens.tolist(), columns, strict=True)):
        session.truncate(0, 0)
        if sources is not None:
            session.attend(0, sources[at])
        prefill.append(session.extend(0, row, keep=len(row))[:, wanted])
        session.truncate(0, len(row) - STEPS)
        steps.append(np.stack([session.step({0: token})[0][wanted] for token in row[-STEPS:]]))
    session.truncate(0, 0)
    return {"prefill": np.stack(prefill), "steps": np.stack(steps)}


def stage_answers(stage: Stage, given: Mapping[str, Array]) -> dict[str, Array]:
    """Return a stage's outputs for golden inputs; uses the first slot.

    Raises:
        InputError: the runtime cannot run them.
    """
    prefill, steps = [], []
    for row in given["values"]:
        count = len(row)
        prefill.append(stage.run(0, row[None], np.zeros(1, np.int64), count)[0])
        ones = (stage.run(0, row[None, at : at + 1], np.array([at]), 1)[0] for at in range(count - STEPS, count))
        steps.append(np.concatenate(list(ones)))
    found = {"prefill": np.stack(prefill), "steps": np.stack(steps)}
    if "closing" in given:
        pairs = zip(given["closing"], given["columns"], strict=True)
        found["logits"] = np.stack([stage.logits(row[None])[0][:, wanted] for row, wanted in pairs])
    return found


def stage_inputs(vectors: Golden, *, where: str) -> dict[str, Array]:
    """Return the inputs of a stage's golden vectors.

    Raises:
        BundleError: the vectors are not those of some of a decoder's layers.
    """
    values = vectors.inputs.get("values")
    if values is None or values.ndim not in (2, 3) or values.shape[1] <= STEPS:
        raise BundleError("the golden vectors are not those of a part of a decoder", where=where)
    return vectors.inputs


def inputs(vectors: Golden, *, where: str) -> tuple[Array, Array, Array | None]:
    """Return ``tokens``, ``columns`` and ``sources`` of golden vectors; the last is None for a decoder alone.

    Raises:
        BundleError: the vectors are not those of a decoder.
    """
    tokens, columns, sources = (vectors.inputs.get(name) for name in ("tokens", "columns", "sources"))
    if tokens is None or columns is None or tokens.ndim != 2 or tokens.shape[1] <= STEPS or columns.ndim != 2:
        raise BundleError("the golden vectors are not those of a decoder", where=where)
    if sources is not None and len(sources) != len(tokens):
        raise BundleError("the golden vectors have not one source each", where=where)
    return tokens, columns, sources

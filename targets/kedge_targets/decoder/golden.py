"""Golden vectors of a decoder: the logits of forced tokens, computed in one step and in single steps.

Inputs: ``tokens`` int64 [vectors, positions], ``columns`` int64 [vectors, columns] (tokens whose logits are compared;
those of a whole vocabulary would be larger than the model). Outputs: ``prefill`` float32 [vectors, positions, columns]
from one step of all positions, ``steps`` [vectors, positions - prompt, columns] from one step for each position after
the prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import BundleError
from kedge_protocol.golden import Golden
from kedge_targets.decoder.session import DecoderSession

Array = npt.NDArray[Any]

STEPS = 4
"""Number of last positions that are computed one by one."""


def answers(session: DecoderSession, tokens: Array, columns: Array) -> dict[str, Array]:
    """Return a session's outputs for golden inputs; uses the first slot.

    Raises:
        InputError: a token is outside the vocabulary, or the context has no room for the vectors.
    """
    prefill, steps = [], []
    for row, wanted in zip(tokens.tolist(), columns, strict=True):
        session.truncate(0, 0)
        prefill.append(session.extend(0, row, keep=len(row))[:, wanted])
        session.truncate(0, len(row) - STEPS)
        steps.append(np.stack([session.step({0: token})[0][wanted] for token in row[-STEPS:]]))
    session.truncate(0, 0)
    return {"prefill": np.stack(prefill), "steps": np.stack(steps)}


def inputs(vectors: Golden, *, where: str) -> tuple[Array, Array]:
    """Return ``tokens`` and ``columns`` of golden vectors.

    Raises:
        BundleError: the vectors are not those of a decoder.
    """
    tokens, columns = vectors.inputs.get("tokens"), vectors.inputs.get("columns")
    if tokens is None or columns is None or tokens.ndim != 2 or tokens.shape[1] <= STEPS or columns.ndim != 2:
        raise BundleError("the golden vectors are not those of a decoder", where=where)
    return tokens, columns

"""Runs decoders that were exported with past and present: the past goes in as a copy, what is new comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets.backends.onnxruntime.decoder.slot_caches import TYPES, zeros
from kedge_targets.decoder.exported import KNOWN, PAST, PRESENT
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.graph import library

Array = npt.NDArray[Any]


def is_exported(session: Any) -> bool:
    """Return whether an ONNX Runtime session is of such a file."""
    return any(one.name.startswith(f"{PAST}.") for one in session.get_inputs())


class ExportedDecoderSession(DecoderSession):
    """See :class:`kedge_targets.decoder.session.DecoderSession`. Slots of one length are computed together, others one
    after the other: files differ in how they take padding.

    Args:
        session: an ONNX Runtime session.

    Raises:
        VerificationError: the graph is not of this form.
        InputError: the caches do not fit into memory.
    """

    def __init__(self, session: Any, *, slots: int, context: int) -> None:
        inputs = {one.name: one for one in session.get_inputs()}
        logits = next((one for one in session.get_outputs() if one.name == "logits"), None)
        if logits is None or "input_ids" not in inputs:
            raise VerificationError("the graph is no decoder", remedy="Export it with past and present")
        super().__init__(slots=slots, context=context, vocabulary=int(logits.shape[-1]))
        self._session = session
        self._types = {name: one.type for name, one in inputs.items() if name in KNOWN}
        self._caches = {
            name: zeros((slots, one.shape[1], context, one.shape[3]), TYPES[one.type])
            for name, one in inputs.items()
            if name.startswith(f"{PAST}.")
        }
        self._presents = [name.replace(PAST, PRESENT, 1) for name in self._caches]

    @property
    def cache_bytes(self) -> int:
        """See :attr:`kedge_targets.decoder.session.DecoderSession.cache_bytes`."""
        return sum(cache.nbytes for cache in self._caches.values())

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.copy`."""
        for cache in self._caches.values():
            cache[to, :, :positions] = cache[source, :, :positions]
        self.lengths[to] = positions

    def _run(self, first: int, tokens: Array, lengths: Array, keep: int) -> Array:
        found = np.empty((len(tokens), keep, self.vocabulary), np.float32)
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length)
            found[rows] = self._alike(first + rows, tokens[rows], int(length), keep)
        return found

    def _alike(self, slots: Array, tokens: Array, length: int, keep: int) -> Array:
        """Return logits [rows, keep, vocabulary] of slots of one length."""
        rows, step = tokens.shape
        after = length + step
        every: dict[str, Array] = {
            "input_ids": tokens,
            "attention_mask": np.ones((rows, after), np.int64),
            "position_ids": np.tile(np.arange(length, after), (rows, 1)),
            **dict.fromkeys(("num_logits_to_keep", "logits_to_keep"), np.array(keep, np.int64)),
        }
        feeds = {name: every[name].astype(_INTEGERS.get(kind, np.int64)) for name, kind in self._types.items()}
        feeds |= {name: cache[slots, :, :length] for name, cache in self._caches.items()}
        try:
            logits, *presents = self._session.run(["logits", *self._presents], feeds)
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(f"ONNX Runtime cannot run this step: {library.reason_of(error)}") from error
        if logits.shape[1] < keep:
            raise InputError(f"the file gives logits of {logits.shape[1]} positions, {keep} are wanted")
        for cache, present in zip(self._caches.values(), presents, strict=True):
            cache[slots, :, length:after] = present[:, :, length:after]
        wanted: Array = logits[:, -keep:].astype(np.float32)
        return wanted

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.close`."""
        self._caches.clear()
        self._session = None


_INTEGERS: dict[str, Any] = {"tensor(int32)": np.int32}

"""Runs decoders with ONNX Runtime on the device: past and present of a cache are one buffer, bound by its address."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets.backends.onnxruntime.decoder.slot_caches import SlotCaches, zeros
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.decoder.windows import Window
from kedge_targets.graph import library

Array = npt.NDArray[Any]

ENCODER = "encoder.onnx"
"""The file of an encoder, beside its decoder."""
_FEATURES = "input_features"


class OnnxDecoderSession(DecoderSession):
    """See :class:`kedge_targets.decoder.session.DecoderSession`.

    Args:
        session: an ONNX Runtime session of a graph as described in ``decoder/graph.py``.
        encoder: one of a graph as described in ``decoder/encoder_graph.py``, if the decoder attends to one.
        caches: where keys and values are.

    Raises:
        VerificationError: the graph is not of this form.
        InputError: the caches do not fit into memory.
    """

    def __init__(
        self, session: Any, *, slots: int, context: int, encoder: Any = None, caches: type[SlotCaches] = SlotCaches
    ) -> None:
        inputs = {one.name: one for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        if not {"input_ids", "keep", "seqlens_k", "total"} <= set(inputs) or "logits" not in outputs:
            raise VerificationError("the graph is no decoder", remedy="Compile it again")
        vocabulary = session.get_outputs()[outputs.index("logits")].shape[-1]
        super().__init__(slots=slots, context=context, vocabulary=int(vocabulary))
        self._session = session
        self._encoder = encoder
        self.has_encoder = encoder is not None
        self._sources = {
            name: zeros((slots, *one.shape[1:]), np.float32)
            for name, one in inputs.items()
            if name.startswith("cross.")
        }
        self._mask = np.zeros((slots, inputs["source_mask"].shape[1]), np.int32) if "source_mask" in inputs else None
        if self._mask is not None:
            # A row that attends to nothing would not be a number.
            self._mask[:, 0] = 1
        self._caches = caches(session, slots=slots, context=context, fixed=self._sources)

    @property
    def windows(self) -> Collection[Window]:
        """See :attr:`kedge_targets.decoder.session.DecoderSession.windows`."""
        return self._caches.windows

    @property
    def cache_bytes(self) -> int:
        """See :attr:`kedge_targets.decoder.session.DecoderSession.cache_bytes`."""
        return self._caches.nbytes + sum(fixed.nbytes for fixed in self._sources.values())

    def check_source(self, source: Array) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.check_source`."""
        if self._encoder is None:
            super().check_source(source)
            return
        wanted = self._encoder.get_inputs()[0]
        if wanted.name == _FEATURES:
            if list(source.shape) != wanted.shape[1:]:
                raise InputError(f"features of {list(source.shape)} are given, {wanted.shape[1:]} are wanted")
            return
        room = next(iter(self._sources.values())).shape[2]
        if not 0 < source.size <= room:
            raise InputError(
                f"the text to read has {source.size} tokens, the encoder takes 1 to {room}",
                remedy="Give a shorter text, or cut it at its sentences",
            )

    def _encode(self, slot: int, source: Array) -> None:
        name = self._encoder.get_inputs()[0].name
        feed = source[None].astype(np.float32 if name == _FEATURES else np.int64)
        try:
            found = self._encoder.run(list(self._sources), {name: feed})
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(f"ONNX Runtime cannot read this source: {library.reason_of(error)}") from error
        for cache, value in zip(self._sources.values(), found, strict=True):
            cache[slot, :, : value.shape[2]] = value[0]
        if self._mask is not None:
            self._mask[slot] = np.arange(self._mask.shape[1]) < source.size

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.copy`."""
        self._caches.copy(source, to, positions)
        for fixed in self._sources.values():
            fixed[to] = fixed[source]
        if self._mask is not None:
            self._mask[to] = self._mask[source]
        self.lengths[to] = positions

    def _run(self, first: int, tokens: Array, lengths: Array, keep: int) -> Array:
        rows = len(tokens)
        inputs = self._caches.inputs(first, rows)
        inputs.write(tokens, lengths, keep)
        if self._mask is not None:
            inputs.binding.bind_cpu_input("source_mask", self._mask[first : first + rows])
        # Bound by its address: to ask for the outputs would wrap each cache.
        logits = np.empty((rows, keep, self.vocabulary), np.float32)
        inputs.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        try:
            self._session.run_with_iobinding(inputs.binding)
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(f"ONNX Runtime cannot run this step: {library.reason_of(error)}") from error
        return logits

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.close`."""
        self._caches.close()
        self._sources.clear()
        self._session = self._encoder = None

"""Runs decoders with ONNX Runtime on the device: past and present of a cache are one buffer, bound by its address."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.graph import library

Array = npt.NDArray[Any]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}


class OnnxDecoderSession(DecoderSession):
    """See :class:`kedge_targets.decoder.session.DecoderSession`.

    Args:
        session: an ONNX Runtime session of a graph as described in ``decoder/graph.py``.

    Raises:
        VerificationError: the graph is not of this form.
        InputError: the caches do not fit into memory.
    """

    def __init__(self, session: Any, *, slots: int, context: int) -> None:
        inputs = {one.name: one for one in session.get_inputs()}
        outputs = [one.name for one in session.get_outputs()]
        if not {"input_ids", "keep", "seqlens_k", "total"} <= set(inputs) or "logits" not in outputs:
            raise VerificationError("the graph is no decoder", remedy="Compile it again")
        vocabulary = session.get_outputs()[outputs.index("logits")].shape[-1]
        super().__init__(slots=slots, context=context, vocabulary=int(vocabulary))
        self._session = session
        self._positions = "position_ids" in inputs
        self._caches = {
            name: _zeros((slots, one.shape[1], context, one.shape[3]), _TYPES[one.type])
            for name, one in inputs.items()
            if name.startswith("past.")
        }
        self._bindings: dict[tuple[int, int], Any] = {}

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
        rows, step = tokens.shape
        binding = self._bound(first, rows)
        after = lengths + step
        feeds = {
            "input_ids": tokens,
            "keep": np.array([keep], np.int64),
            "seqlens_k": (after - 1).astype(np.int32),
            "total": np.array([after.max()], np.int32),
        }
        if self._positions:
            feeds["position_ids"] = lengths[:, None] + np.arange(step)
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(f"ONNX Runtime cannot run this step: {library.reason_of(error)}") from error
        logits: Array = binding.get_outputs()[-1].numpy()
        return logits

    def _bound(self, first: int, rows: int) -> Any:
        """Return a binding of the slots from ``first`` on; its caches stay bound."""
        if (first, rows) not in self._bindings:
            binding = self._session.io_binding()
            for name, cache in self._caches.items():
                part = cache[first : first + rows]
                place = ("cpu", 0, part.dtype.type, part.shape, part.ctypes.data)
                binding.bind_input(name, *place)
                binding.bind_output(name.replace("past.", "present."), *place)
            self._bindings[first, rows] = binding
        return self._bindings[first, rows]

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.close`."""
        self._bindings.clear()
        self._caches.clear()
        self._session = None


def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    try:
        return np.zeros(shape, dtype)
    except MemoryError as error:
        raise InputError(
            f"a cache of {' x '.join(map(str, shape))} does not fit into memory",
            remedy="Ask for fewer slots or a shorter context",
        ) from error

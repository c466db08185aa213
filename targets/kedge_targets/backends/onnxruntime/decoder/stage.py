"""Runs some of a decoder's layers with ONNX Runtime."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets.backends.onnxruntime.decoder.slot_caches import SlotCaches
from kedge_targets.decoder.stages import Stage
from kedge_targets.graph import library

Array = npt.NDArray[Any]

HEAD = "head.onnx"
"""The file of the last norm and the head, beside the first layers."""


class OnnxStage(Stage):
    """See :class:`kedge_targets.decoder.stages.Stage`.

    Args:
        layers: an ONNX Runtime session of a graph as described in ``decoder/graph.py``, whose output is ``hidden_out``.
        head: one of the head, with the first layers.
        turn: held while one of several stages with the same sessions computes.

    Raises:
        VerificationError: the graph is not of this form.
        InputError: the caches do not fit into memory.
    """

    def __init__(
        self, layers: Any, head: Any, turn: contextlib.AbstractContextManager[Any], *, slots: int, context: int
    ) -> None:
        inputs = {one.name for one in layers.get_inputs()}
        outputs = {one.name: one for one in layers.get_outputs()}
        if len(inputs & {"input_ids", "hidden"}) != 1 or "hidden_out" not in outputs:
            raise VerificationError("the graph is no part of a decoder", remedy="Compile it again")
        self._layers, self._head, self._turn = layers, head, turn
        self._channels = int(outputs["hidden_out"].shape[-1])
        self.vocabulary = 0 if head is None else int(head.get_outputs()[0].shape[-1])
        self._caches = SlotCaches(layers, slots=slots, context=context, fixed={})
        self.windows = self._caches.windows

    def run(self, first: int, values: Array, lengths: Array, keep: int) -> Array:
        """See :meth:`kedge_targets.decoder.stages.Stage.run`."""
        rows, step = values.shape[:2]
        hidden = np.empty((rows, step, self._channels), np.float32)
        inputs = self._caches.inputs(first, rows)
        inputs.write(values, lengths, keep)
        inputs.binding.bind_output("hidden_out", "cpu", 0, np.float32, hidden.shape, hidden.ctypes.data)
        with self._turn, _in_words():
            self._layers.run_with_iobinding(inputs.binding)
        return hidden[:, step - keep :]

    def logits(self, hidden: Array) -> Array:
        """See :meth:`kedge_targets.decoder.stages.Stage.logits`."""
        if self._head is None:
            return super().logits(hidden)
        feeds = {"hidden": hidden, "keep": np.array([hidden.shape[1]], np.int64)}
        with self._turn, _in_words():
            logits: Array = self._head.run(["logits"], feeds)[0]
        return logits

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.stages.Stage.copy`."""
        self._caches.copy(source, to, positions)

    @property
    def cache_bytes(self) -> int:
        """See :attr:`kedge_targets.decoder.stages.Stage.cache_bytes`."""
        return self._caches.nbytes

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.stages.Stage.close`."""
        self._caches.close()
        self._layers = self._head = None


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the library's errors have no common base but Exception
        raise InputError(f"ONNX Runtime cannot run this step: {library.reason_of(error)}") from error

"""Runs decoders with OpenVINO on the device: an inference request for each slot, with the slot's keys and values as its
states. All requests share the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import InputError, VerificationError
from kedge_targets.backends.openvino import library
from kedge_targets.backends.openvino.decoder.graph import HEAD_INPUT, NO_WINDOWS, WINDOWS
from kedge_targets.decoder.session import DecoderSession

Array = npt.NDArray[Any]

_KEEP = "keep"
_MOST_MASKED = 64
"""Places of a slot that are masked before its states are written anew."""


class OpenVinoDecoderSession(DecoderSession):
    """See :class:`kedge_targets.decoder.session.DecoderSession`.

    Slots are computed one after the other. A state can only grow: where a slot is copied or cut by much, its states are
    read and written anew, at the price of two copies. With keys and values in int8 they are rounded once more by that.
    A few positions that are cut off, as wrong guesses are, stay where they are and are masked.

    Args:
        compiled: a model as described in ``decoder/graph.py``, with :func:`cut_to_kept`.
        windows: whether a layer counts the places that it sees, so that none may be masked.

    Raises:
        VerificationError: the model is not of this form.
    """

    def __init__(self, compiled: Any, *, slots: int, context: int, windows: bool = True) -> None:
        named = {name: one for one in (*compiled.inputs, *compiled.outputs) for name in one.get_names()}
        if not {"input_ids", "attention_mask", "beam_idx", _KEEP, "logits"} <= set(named):
            raise VerificationError("the model is no decoder", remedy="Compile it again")
        vocabulary = named["logits"].get_partial_shape()[-1].get_length()
        super().__init__(slots=slots, context=context, vocabulary=int(vocabulary))
        self._compiled = compiled
        self._positions = "position_ids" in named
        self._requests = [compiled.create_infer_request() for _ in range(slots)]
        self._used = [np.zeros(0, bool) for _ in range(slots)]
        """Of each place in a slot's states, whether it is a position and not masked. Positions from ``lengths`` on are
        cut off before the next step."""
        self._most_masked = 0 if windows else _MOST_MASKED
        self._position_bytes = _position_bytes(compiled, self._requests[0])

    @property
    def cache_bytes(self) -> int:
        """See :attr:`kedge_targets.decoder.session.DecoderSession.cache_bytes`."""
        return self.slots * self.context * self._position_bytes

    def copy(self, source: int, to: int, positions: int) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.copy`."""
        if source != to:
            self._write(to, self._read(source, positions))
            self._used[to] = np.ones(positions, bool)
        self.lengths[to] = positions

    def step(self, tokens: Mapping[int, int]) -> dict[int, Array]:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.step`."""
        for slot, token in tokens.items():
            self._check([token], int(self.lengths[slot]))
        return {slot: self.extend(slot, [token])[0] for slot, token in tokens.items()}

    def _run(self, first: int, tokens: Array, lengths: Array, keep: int) -> Array:
        return np.concatenate(
            [self._infer(first + at, row[None], int(lengths[at]), keep) for at, row in enumerate(tokens)]
        )

    def _infer(self, slot: int, tokens: Array, length: int, keep: int) -> Array:
        self._cut(slot, length)
        after = length + tokens.shape[1]
        used = np.append(self._used[slot], np.ones(tokens.shape[1], bool))
        feeds = {
            "input_ids": tokens,
            "attention_mask": used[None].astype(np.int64),
            "beam_idx": np.zeros(1, np.int32),
            _KEEP: np.array([keep], np.int64),
        }
        if self._positions:
            feeds["position_ids"] = np.arange(length, after)[None]
        try:
            found = self._requests[slot].infer(feeds, share_inputs=True)
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            self._requests[slot].reset_state()
            self.lengths[slot], self._used[slot] = 0, np.zeros(0, bool)
            raise InputError(f"OpenVINO cannot run this step: {library.reason_of(error)}") from error
        self._used[slot] = used
        logits: Array = found["logits"]
        return logits

    def _cut(self, slot: int, length: int) -> None:
        """Keep the first positions of a slot's states."""
        used = self._used[slot]
        places = np.flatnonzero(used)
        if len(places) == length:
            return
        if not length:
            self._requests[slot].reset_state()
            self._used[slot] = np.zeros(0, bool)
        elif len(used) - length <= self._most_masked:
            used[places[length] :] = False
        else:
            self._write(slot, self._read(slot, length))
            self._used[slot] = np.ones(length, bool)

    def _read(self, slot: int, length: int) -> dict[str, Array]:
        """Return the first positions of a slot's states, by name."""
        places = np.flatnonzero(self._used[slot])[:length]
        return {
            one.name: np.ascontiguousarray(one.state.data[:, :, places]) for one in self._requests[slot].query_state()
        }

    def _write(self, slot: int, values: Mapping[str, Array]) -> None:
        tensor = library.load().Tensor
        for one in self._requests[slot].query_state():
            one.state = tensor(values[one.name])

    def close(self) -> None:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.close`."""
        self._requests.clear()
        self._compiled = None


def has_windows(model: Any) -> bool:
    """Return whether a layer of a model may have a window."""
    return not model.has_rt_info(WINDOWS) or model.get_rt_info(WINDOWS).astype(str) != NO_WINDOWS


def cut_to_kept(model: Any) -> None:
    """Give a model an input ``keep`` int64 [1]: logits are computed for so many last positions, not for all.

    Raises:
        VerificationError: the model is not as described in ``decoder/graph.py``.
    """
    openvino = library.load()
    from openvino import opset13 as ops

    found = [node for node in model.get_ops() if node.get_friendly_name() == HEAD_INPUT]
    if len(found) != 1:
        raise VerificationError("the model is no decoder", remedy="Compile it again")
    readers = list(found[0].output(0).get_target_inputs())
    keep = ops.parameter(openvino.PartialShape([1]), np.int64, name=_KEEP)
    keep.output(0).get_tensor().set_names({_KEEP})
    one, axis, end = (ops.constant(np.array([value], np.int64)) for value in (1, 1, 2**31 - 1))
    last = ops.slice(found[0], ops.negative(keep), end, one, axis)
    for reader in readers:
        reader.replace_source_output(last.output(0))
    model.add_parameters([keep])
    model.validate_nodes_and_infer_types()


def _position_bytes(compiled: Any, request: Any) -> int:
    itemsize = compiled.get_property("KV_CACHE_PRECISION").size
    shapes = [one.state.shape for one in request.query_state()]
    return sum(int(shape[1]) * int(shape[3]) * int(itemsize) for shape in shapes)

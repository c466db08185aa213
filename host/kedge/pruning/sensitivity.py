"""Measures the error of the outputs without some channels: ONNX Runtime runs the graph with zeros where they are
read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.pruning import inference_session
from kedge.pruning.groups import Group, Structure
from kedge.pruning.rule_scope import Place

if TYPE_CHECKING:
    from kedge.step import Context

Array = npt.NDArray[Any]

_BATCH = 16


class Probe:
    """A graph whose channels can be switched off, with its outputs on some samples when all channels are on.

    Args:
        samples: the largest number of samples used.
    """

    def __init__(self, structure: Structure, groups: Iterable[Group], context: Context, samples: int) -> None:
        import onnx
        from onnx import numpy_helper

        self._places = {group: group.consuming or group.producing for group in groups}
        names = {name for places in self._places.values() for name, _ in places}
        model = onnx.ModelProto()
        model.CopyFrom(structure.model)
        del model.graph.initializer[:]
        self._weights: dict[str, Array] = {}
        for tensor in structure.model.graph.initializer:
            if tensor.name in names:
                self._weights[tensor.name] = numpy_helper.to_array(tensor)
                kind = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
                model.graph.input.append(kind)
            else:
                model.graph.initializer.append(tensor)
        self._session = inference_session.session(model, where="the graph to prune", optimized=True)
        self._feeds = _taken(context, samples)
        self._right = self._answers({})

    def error(self, off: Mapping[Group, Sequence[int]]) -> float:
        """Return the mean square error of the outputs without some channels, over their mean square; of the worst
        output."""
        wrong = self._answers(off)
        worst = 0.0
        for right, now in zip(self._right, wrong, strict=True):
            power = float(np.square(right).mean())
            worst = max(worst, float(np.square(now - right).mean()) / max(power, np.finfo(np.float64).tiny))
        return worst if np.isfinite(worst) else float("inf")

    def _answers(self, off: Mapping[Group, Sequence[int]]) -> list[Array]:
        weights = dict(self._weights)
        for group, channels in off.items():
            for place in self._places[group]:
                weights[place[0]] = _without(weights[place[0]], place, group, channels)
        parts = [self._session.run(None, {**feeds, **weights}) for feeds in self._feeds]
        found = []
        for index, first in enumerate(parts[0]):
            if np.asarray(first).dtype.kind == "f":
                found.append(np.concatenate([np.ravel(part[index]).astype(np.float64) for part in parts]))
        return found


def _without(weight: Array, place: Place, group: Group, channels: Sequence[int]) -> Array:
    made = np.moveaxis(weight.copy(), place[1], 0)
    for channel in channels:
        made[group.members[place][channel]] = 0
    return np.ascontiguousarray(np.moveaxis(made, 0, place[1]))


def _taken(context: Context, samples: int) -> list[dict[str, Array]]:
    taken, left = [], samples
    for batch in context.samples.batches(1 if context.fixed_batch else _BATCH):
        rows = min(left, len(next(iter(batch.values()))))
        if rows <= 0:
            break
        taken.append({name: np.ascontiguousarray(array[:rows]) for name, array in batch.items()})
        left -= rows
    return taken

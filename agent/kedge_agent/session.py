"""Sessions carry states from a model's outputs to its inputs from call to call."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import tensors
from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.errors import InputError

if TYPE_CHECKING:
    from kedge_agent.model import Model

Array = npt.NDArray[Any]


class Session:
    """One stream through a model with states: a microphone, a patient, a conversation.

    Args:
        model: a model whose bundle has states.
        initial: initial states by input; zeros by default.

    A session stays with the bundle that answered its first call, since states have no meaning to another bundle.

    Raises:
        InputError: the model has no states, or none with this name.
    """

    def __init__(self, model: Model, initial: Mapping[str, Any]) -> None:
        self._loaded = model.loaded()
        config = self._loaded.bundle.config
        self._pairs = {state.input: state.output for state in config.states}
        if not self._pairs:
            raise InputError(
                f"the model {config.name!r} has no states",
                remedy="Call the model itself; `kedge compile --state IN=OUT` declares a state",
            )
        if unknown := sorted(set(initial) - set(self._pairs)):
            raise InputError(f"{unknown[0]!r} is no state of the model", remedy=f"It has {', '.join(self._pairs)}")
        self._initial = {name: np.array(value) for name, value in initial.items()}
        self._alone = threading.Lock()
        self._states = dict(self._initial)
        self._inputs = {spec.name: spec for spec in config.inputs}
        self._plain = [spec for spec in config.inputs if spec.name not in self._pairs]
        self._left = [spec.name for spec in config.outputs if spec.name not in self._pairs.values()]

    @property
    def states(self) -> Mapping[str, Array]:
        """Return the states for the next call, by input; empty before the first call unless they were given."""
        return dict(self._states)

    def reset(self) -> None:
        """Start over with initial states."""
        with self._alone:
            self._states = dict(self._initial)

    def __call__(self, array: Any = None, /, **named: Any) -> Any:
        """Run one step; see :meth:`Model.__call__`. Inputs without the states, in the model's own axes; one sample may
        come without its batch axis.

        Returns:
            The outputs that are not states: the only one as an array, or a dictionary by name. If all outputs are
            states, these.

        Raises:
            InputError: see :meth:`Model.__call__`.
        """
        given = self._given(array, named)
        with self._alone:
            one, samples = self._batch(given)
            feed = {name: np.expand_dims(value, self._axis(name)) if one else value for name, value in given.items()}
            for name in self._pairs:
                feed[name] = self._states[name] if name in self._states else _zeros(self._inputs[name], samples)
            answer = self._loaded(feed, {})
            results = answer if isinstance(answer, dict) else {self._loaded.bundle.config.outputs[0].name: answer}
            self._states = {name: results[output] for name, output in self._pairs.items()}
        kept = self._left or list(self._pairs.values())
        shown = {name: self._shown(name, results[name], one=one) for name in kept}
        return shown[kept[0]] if len(kept) == 1 else shown

    def _given(self, array: Any, named: Mapping[str, Any]) -> dict[str, Array]:
        if isinstance(array, Mapping):
            named = {**array, **named}
        elif array is not None:
            batched = [spec.name for spec in self._plain if spec.name not in named]
            if len(batched) != 1:
                raise InputError(
                    "an input was given without its name",
                    remedy=f"Give all inputs by name, as keywords: {', '.join(spec.name for spec in self._plain)}",
                )
            named = {batched[0]: array, **named}
        names = [spec.name for spec in self._plain]
        if set(named) != set(names):
            raise InputError(f"inputs {', '.join(sorted(named)) or 'none'} were given, a step takes {', '.join(names)}")
        return {spec.name: tensors.as_array(named[spec.name], spec) for spec in self._plain}

    def _batch(self, given: Mapping[str, Array]) -> tuple[bool, int]:
        """Return whether a single sample came without a batch axis, and the number of samples."""
        for spec in self._plain:
            if spec.batched:
                array = given[spec.name]
                if array.ndim == len(spec.shape) - 1:
                    return True, 1
                if array.ndim == len(spec.shape):
                    return False, int(array.shape[spec.batch_axis])
        return False, 1

    def _axis(self, name: str) -> tuple[int, ...] | int:
        spec = self._inputs[name]
        return spec.batch_axis if spec.batched else ()

    def _shown(self, name: str, array: Array, *, one: bool) -> Array:
        if not one:
            return array
        spec = next(spec for spec in self._loaded.bundle.config.outputs if spec.name == name)
        shown: Array = array if not spec.batched else array.take(0, spec.batch_axis)
        return shown


def _zeros(spec: TensorSpec, samples: int) -> Array:
    shape = [samples if at == spec.batch_axis else size for at, size in enumerate(spec.shape)]
    if None in shape:
        raise InputError(
            "its size is open, there is no first state of zeros",
            where=f"state {spec.name!r}",
            remedy=f"Give it: model.session({spec.name}=…)",
        )
    return np.zeros([size or 0 for size in shape], np.dtype(spec.dtype))

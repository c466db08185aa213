"""Running a bundle's model: raw samples in, real numbers out. Host evaluation, golden vectors on the device and the
application's :class:`kedge_agent.Model` all run this same code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import preprocess, tensors
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.errors import InputError
from kedge_targets import registry

Array = npt.NDArray[Any]


class Executor:
    """A model with what goes before and after it.

    Args:
        folder: holds the bundle's files by title.
        backend, entry, options: see :class:`kedge_protocol.bundle.config.BundleConfig`.
        inputs, outputs: specifications in the trained model's order.
        kernel_set: one of the runtime's; None for its own choice.
    """

    def __init__(
        self,
        folder: Path,
        *,
        backend: str,
        entry: str,
        options: Mapping[str, Any],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        kernel_set: str | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        runtime = registry.runtime(backend)
        self._session = runtime.load(folder / entry, options, kernel_set=kernel_set)
        self.concurrent = self._session.concurrent
        self._in_order = sorted(inputs, key=lambda spec: spec.file.index)
        fixed = {spec.file.shape[_file_batch_axis(spec)] for spec in inputs}
        # A file with its batch fixed takes larger batches in pieces of that size.
        self._piece = next(iter(fixed)) if len(fixed) == 1 else None

    @classmethod
    def of(cls, folder: Path, config: BundleConfig, *, kernel_set: str | None = None) -> Executor:
        """The executor of a bundle whose files lie in ``folder``."""
        return cls(
            folder,
            backend=config.backend,
            entry=config.entry,
            options=config.runtime_options,
            inputs=config.inputs,
            outputs=config.outputs,
            kernel_set=kernel_set,
        )

    def __call__(self, raw: Mapping[str, Array]) -> dict[str, Array]:
        """Run a batch.

        Args:
            raw: input name → samples before preprocessing; first axis is the batch.

        Returns:
            Output name → real numbers, first axis the batch.

        Raises:
            InputError: an input is missing, unknown, or of the wrong shape.
        """
        prepared = self._prepare(raw)
        length = prepared[0][1]
        piece = self._piece
        if piece is None or piece == length:
            results = self._session.run([array for array, _ in prepared])
        else:
            results = self._in_pieces(prepared, length, piece)
        return {spec.name: tensors.from_file(results[spec.file.index], spec) for spec in self.outputs}

    def _prepare(self, raw: Mapping[str, Array]) -> list[tuple[Array, int]]:
        if len(raw) != len(self.inputs) or any(spec.name not in raw for spec in self.inputs):
            given, known = ", ".join(sorted(raw)), ", ".join(spec.name for spec in self.inputs)
            raise InputError(f"inputs {given or 'none'} were given, the model takes {known}")
        prepared = []
        for spec in self._in_order:
            array = np.asarray(raw[spec.name])
            tensors.check_input(array, spec)
            length = array.shape[0]
            if spec.preprocess is not None:
                array = preprocess.apply(array, spec.preprocess, layout=spec.layout)
            prepared.append((tensors.to_file(array, spec), length))
        if len({length for _, length in prepared}) != 1:
            raise InputError("the inputs have different numbers of samples")
        return prepared

    def _in_pieces(self, prepared: list[tuple[Array, int]], length: int, piece: int) -> list[Array]:
        if length % piece:
            raise InputError(f"the model takes batches of {piece}, {length} samples are no multiple of it")
        in_axes = [_file_batch_axis(spec) for spec in self._in_order]
        out_axes = {spec.file.index: _file_batch_axis(spec) for spec in self.outputs}
        collected: list[list[Array]] = []
        for start in range(0, length, piece):
            parts = [
                np.ascontiguousarray(np.moveaxis(np.moveaxis(array, axis, 0)[start : start + piece], 0, axis))
                for (array, _), axis in zip(prepared, in_axes, strict=True)
            ]
            collected.append([np.array(result) for result in self._session.run(parts)])
        return [
            np.concatenate(column, axis=out_axes.get(index, 0))
            for index, column in enumerate(zip(*collected, strict=True))
        ]

    def close(self) -> None:
        """Free the session."""
        self._session.close()


def _file_batch_axis(spec: TensorSpec) -> int:
    return 0 if spec.file.permutation is None else spec.file.permutation.index(0)

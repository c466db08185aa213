"""Running a bundle's model: raw samples in, real numbers out. Host evaluation, golden vectors on the device and the
application's :class:`kedge_agent.Model` all run this same code.

What does not depend on the samples is worked out when the model is loaded, so that a call costs little more than the
runtime's own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import tensors
from kedge_protocol.bundle.config import TEXT, BundleConfig, TensorSpec
from kedge_protocol.errors import InputError
from kedge_protocol.progress import ignore_progress
from kedge_targets import registry
from kedge_targets.calls import plan as call_plan
from kedge_targets.calls.gathering import Gathering, Run
from kedge_targets.calls.plan import CallPlan
from kedge_targets.pipeline import normalization

if TYPE_CHECKING:
    from kedge_targets.worker.progress import Progress

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class _Input:
    """The precomputed plan of one input.

    Attributes:
        position: among the model's inputs; inputs themselves are kept in the file's order.
        sample: shape of one sample, or None where an axis is free or the batch is not the first.
        rank: with the batch.
        kinds: of dtypes that it takes.
        fill: where the file has fixed sizes and samples may be shorter: the size of each axis, with 0 for the others.
        batch_axis: in the file.
    """

    spec: TensorSpec
    position: int
    sample: tuple[int | None, ...] | None
    rank: int
    kinds: str
    batch_axis: int
    preprocess: normalization.Prepared | None
    encode: tensors.Conversion
    fill: tuple[int, ...] | None = None


class Executor:
    """A model with its pre- and postprocessing. Several threads may use it at the same time.

    Args:
        folder: holds the bundle's files by title.
        backend, entry, options: see :class:`kedge_protocol.bundle.config.BundleConfig`.
        inputs, outputs: specifications in the trained model's order.
        kernel_set: one of the runtime's; None for its own choice.
        plan: how calls are run on this device; its options count over ``options``.

    Raises:
        TargetError: unknown backend.
        MissingDependencyError: no runtime is installed.
        VerificationError: the runtime refuses the file.
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
        plan: CallPlan | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.plan = plan
        """How calls are run; None where nothing was chosen on this device."""
        runtime = registry.runtime(backend)
        options = options if plan is None else {**options, **plan.options}
        self._session = runtime.load(folder / entry, options, kernel_set=kernel_set)
        self._alone = threading.Lock()
        self._run: Run = self._session.run if self._session.concurrent else self._run_alone
        self._gathering = self._gatherer(plan)
        if self._gathering is not None:
            self._run = self._gathering
        self._names = [spec.name for spec in inputs]
        self._plan = sorted(map(_planned, inputs, range(len(inputs))), key=lambda item: item.spec.file.index)
        self._decode = [(spec.file.index, _decoder(spec)) for spec in outputs]
        fixed = {item.spec.file.shape[item.batch_axis] for item in self._plan if item.spec.batched}
        # A file with its batch fixed takes larger batches in pieces of that size.
        self._piece = next(iter(fixed)) if len(fixed) == 1 else None
        self._lone = [spec.name for spec in outputs if not spec.batched]
        plain = all(spec.batch_axis == 0 for spec in (*inputs, *outputs))
        filled = any(item.fill is not None for item in self._plan)
        self.one = self._short_cut() if len(inputs) == len(outputs) == 1 and plain and not filled else None
        """For a model with one input and one output: an array in, an array out, like :meth:`run` with less around the
        runtime's own call."""

    @classmethod
    def of(
        cls,
        folder: Path,
        config: BundleConfig,
        *,
        kernel_set: str | None = None,
        cache: Path | None = None,
        progress: Progress | None = None,
    ) -> Executor:
        """Make the executor of a bundle with its files in ``folder``, and prepare the bundle for this device if needed.

        Args:
            cache: where backends keep what they build here; None for ``KEDGE_CACHE`` or the user's own.
            progress: of the preparation.
        """
        prepared: Mapping[str, Any] = {}
        plan = None if kernel_set is not None else call_plan.read(cache, config)
        if kernel_set is None:
            prepared = registry.runtime(config.backend).prepare(
                folder, config, cache=cache or _users_cache(), progress=progress or ignore_progress
            )
        return cls(
            folder,
            backend=config.backend,
            entry=config.entry,
            options={**config.runtime_options, **prepared},
            inputs=config.inputs,
            outputs=config.outputs,
            kernel_set=kernel_set,
            plan=plan,
        )

    def __call__(self, raw: Mapping[str, Any]) -> dict[str, Array]:
        """Run a batch.

        Args:
            raw: input name → samples before preprocessing; first axis is the batch.

        Returns:
            Output name → real numbers, first axis the batch.

        Raises:
            InputError: an input is missing, unknown, or of the wrong shape.
        """
        results = self.run(self.in_order(raw))
        return {spec.name: result for spec, result in zip(self.outputs, results, strict=True)}

    def on_samples(self, samples: Mapping[str, Array]) -> dict[str, Array]:
        """Like a call, with the samples along the first axis of every array, whatever the model's own axes are, there
        and back. Of an input without a batch the first sample's value is taken."""
        raw = {spec.name: tensors.from_batch_first(samples[spec.name], spec) for spec in self.inputs}
        answer = self(raw)
        return {spec.name: tensors.to_batch_first(answer[spec.name], spec) for spec in self.outputs}

    def in_order(self, raw: Mapping[str, Any]) -> list[Any]:
        """Return the inputs in the model's order.

        Raises:
            InputError: one is missing or unknown.
        """
        if len(raw) != len(self._names) or any(name not in raw for name in self._names):
            given = ", ".join(sorted(map(str, raw)))
            raise InputError(f"inputs {given or 'none'} were given, the model takes {', '.join(self._names)}")
        return [raw[name] for name in self._names]

    def run(self, raw: Sequence[Any]) -> list[Array]:
        """Like a call, with arrays (or what numpy makes one of) in the order of :attr:`inputs` and results in the
        order of :attr:`outputs`; the caller's own arrays are never changed."""
        prepared = []
        length = -1
        lengths: dict[int, int] = {}
        for item in self._plan:
            array = tensors.as_array(raw[item.position], item.spec)
            shape = array.shape
            if shape[1:] != item.sample or len(shape) != item.rank or array.dtype.kind not in item.kinds:
                tensors.check_input(array, item.spec)
            if item.fill is not None:
                lengths |= {size: have for size, have in zip(item.fill, shape, strict=True) if size}
                array = _filled(array, item)
            if item.spec.batched:
                axis = item.spec.batch_axis
                if length not in (-1, shape[axis]):
                    raise InputError("the inputs have different numbers of samples")
                length = shape[axis]
            if item.preprocess is not None:
                array = item.preprocess(array)
            prepared.append(item.encode(array if item.spec.batched else array[np.newaxis]))
        if length == 0:
            raise InputError("no samples were given")
        if self._lone and length > 1:
            raise InputError(
                f"output {self._lone[0]!r} belongs to one sample, {length} were given",
                remedy="Call the model with one sample at a time",
            )
        piece = self._piece if length != -1 else None
        in_pieces = piece is not None and piece != length
        results = self._in_pieces(prepared, length) if in_pieces else self._run(prepared)
        answers = [decode(results[index]) for index, decode in self._decode]
        return (
            answers
            if not lengths
            else [_cut(one, spec, lengths) for one, spec in zip(answers, self.outputs, strict=True)]
        )

    def _short_cut(self) -> Callable[[Array], Array]:
        item, piece, run, full = self._plan[0], self._piece, self._run, self.run
        sample, rank, turn, encode, kinds = item.sample, item.rank, item.preprocess, item.encode, item.kinds
        index, decode = self._decode[0]
        out = self.outputs[0]
        single = (1, *sample) if sample is not None and piece in (None, 1) else None
        # Numbers that the file takes, or gives, as they are: conversions of nothing cost as much as a small model.
        taken = np.dtype(item.spec.file.dtype) if turn is None and _is_plain(item.spec) else None
        given = np.dtype(out.dtype) if _is_plain(out) else None

        def one(array: Array) -> Array:
            shape = array.shape
            if (
                array.dtype is taken
                and (
                    shape == single
                    or (
                        len(shape) == rank
                        and shape[1:] == sample
                        and (shape[0] == piece or (piece is None and shape[0]))
                    )
                )
                and array.flags.c_contiguous
            ):
                made = run([array])[index]
                return made if made.dtype is given and made.flags.c_contiguous else decode(made)
            length = shape[0] if len(shape) == rank else 0
            known = shape[1:] == sample and array.dtype.kind in kinds
            if not known or not length or (length != piece and piece is not None):
                return full((array,))[0]
            if turn is not None:
                array = turn(array)
            return decode(run([encode(array)])[index])

        return one

    def _gatherer(self, plan: CallPlan | None) -> Gathering | None:
        if plan is None or plan.most < 2 or not can_be_gathered(self.inputs, self.outputs):
            return None
        ins = sorted(self.inputs, key=lambda spec: spec.file.index)
        outs = sorted(self.outputs, key=lambda spec: spec.file.index)
        return Gathering(
            self._run,
            axes_in=[_file_batch_axis(spec) for spec in ins],
            axes_out=[_file_batch_axis(spec) for spec in outs],
            gathered=plan.gathered,
            at_once=plan.at_once if self._session.concurrent else 1,
        )

    def _run_alone(self, prepared: list[Array]) -> list[Array]:
        with self._alone:
            return self._session.run(prepared)

    def _in_pieces(self, prepared: list[Array], length: int) -> list[Array]:
        piece = self._piece or length
        if length % piece:
            raise InputError(f"the model takes batches of {piece}, {length} samples are no multiple of it")
        out_axes = {spec.file.index: _file_batch_axis(spec) for spec in self.outputs}
        collected: list[list[Array]] = []
        for start in range(0, length, piece):
            parts = [
                np.ascontiguousarray(array[(slice(None),) * item.batch_axis + (slice(start, start + piece),)])
                if item.spec.batched
                else array
                for array, item in zip(prepared, self._plan, strict=True)
            ]
            collected.append(self._run(parts))
        return [
            np.concatenate(column, axis=out_axes.get(index, 0))
            for index, column in enumerate(zip(*collected, strict=True))
        ]

    @property
    def concurrent(self) -> bool:
        """Whether several calls run at the same time; otherwise they wait for each other."""
        return self._session.concurrent

    @property
    def gathered_sizes(self) -> Mapping[int, tuple[int, int]]:
        """Number of samples → how many calls of the runtime had so many, and their nanoseconds together; empty where
        calls are not gathered."""
        return {} if self._gathering is None else self._gathering.sizes

    @property
    def detail(self) -> str:
        """What really runs the model here, in words; empty where the runtime's name says it all."""
        return self._session.detail

    @property
    def figures(self) -> Mapping[str, float]:
        """What was measured of it on this device once and for all; empty where nothing was."""
        chosen = {} if self.plan is None else self.plan.figures
        return {**chosen, **self._session.figures}

    def close(self) -> None:
        """Release the session."""
        self._session.close()


def can_be_gathered(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> bool:
    """Return whether a file takes the samples of several calls at once: every tensor has a batch, of any size."""
    specs = (*inputs, *outputs)
    free = all(spec.batched and spec.file.shape[_file_batch_axis(spec)] is None for spec in specs)
    return free and sorted(spec.file.index for spec in outputs) == list(range(len(outputs)))


def _users_cache() -> Path:
    from kedge_targets.worker import environment  # the worker's modules weigh something, and most callers name a folder

    return environment.cache_dir()


def _planned(spec: TensorSpec, position: int) -> _Input:
    how = spec.preprocess
    rank = len(spec.shape)
    return _Input(
        spec,
        position,
        None if None in spec.shape[1:] or spec.batch_axis != 0 else spec.shape[1:],
        rank,
        "U" if spec.dtype == TEXT else "fiub",
        _file_batch_axis(spec),
        None if how is None else normalization.prepared(how, layout=spec.layout, rank=rank),
        tensors.encoder(spec, reuse=how is not None),
        filled_sizes(spec),
    )


def filled_sizes(spec: TensorSpec) -> tuple[int, ...] | None:
    """Return the size of each axis that is free for the caller and fixed in the file, with 0 for the others; None where
    there is none."""
    if not spec.batched:
        return None
    inner = spec.file.permutation
    sizes = [spec.file.shape[at if inner is None else inner.index(at)] for at in range(len(spec.shape))]
    found = tuple(
        size or 0 if want is None and at != spec.batch_axis else 0
        for at, (want, size) in enumerate(zip(spec.shape, sizes, strict=True))
    )
    return found if any(found) else None


def _filled(array: Array, item: _Input) -> Array:
    """Return samples filled up with zeros to the file's sizes.

    Raises:
        InputError: they are longer.
    """
    widths = [(0, max(0, size - have)) for size, have in zip(item.fill or (), array.shape, strict=True)]
    for axis, (size, have) in enumerate(zip(item.fill or (), array.shape, strict=True)):
        if size and have > size:
            raise InputError(
                f"axis {axis} has length {have}, this bundle takes at most {size}",
                where=f"input {item.spec.name!r}",
                remedy="Its file has one size, that of the longest calibration sample: calibrate with one as long as "
                "any that is evaluated or used",
            )
    return np.pad(array, widths)


def _cut(array: Array, spec: TensorSpec, lengths: Mapping[int, int]) -> Array:
    """Return an output without what belongs to the zeros that the inputs were filled up with."""
    fill = filled_sizes(spec)
    if fill is None:
        return array
    return array[tuple(slice(lengths.get(size)) if size else slice(None) for size in fill)]


def _is_plain(spec: TensorSpec) -> bool:
    """Return whether the file's tensor equals the caller's: neither quantized nor transposed."""
    return spec.file.scale is None and spec.file.permutation is None


def _file_batch_axis(spec: TensorSpec) -> int:
    axis = spec.batch_axis if spec.batched else 0
    return axis if spec.file.permutation is None else spec.file.permutation.index(axis)


def _decoder(spec: TensorSpec) -> Callable[[Array], Array]:
    decode = tensors.decoder(spec)
    return decode if spec.batched else lambda array: decode(array)[0]

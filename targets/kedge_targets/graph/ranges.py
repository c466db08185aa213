"""Observes the ranges of a graph's activations on calibration samples.

The graph runs in ONNX Runtime with the tensors as further outputs. Nothing is kept but a few numbers for each tensor:
a first pass finds the least and the greatest value, a second one (where the method asks for more) a histogram of
:data:`BINS` bins between them.

What is no number of the model's own is left out: infinities, values as good as infinite (from 1e30 on), and, in tensors
that go into a Softmax by element-wise operators alone, values below -5000: attention masks add -10000 or less there.
Exact zeros count for the percentile, but not for the other searches: 0 is met exactly by every scale. What only goes
into a SiLU or its like begins where that begins to answer (:mod:`kedge_targets.graph.flat_activations`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import DatasetError, ModelError
from kedge_targets.graph import attention, batch, flat_activations, library, range_clipping, signature, unseen_ends
from kedge_targets.numerics import RangeMethod

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]
Sample = Mapping[str, Array]

BINS = 2048
_AS_GOOD_AS_INFINITE = 1e30
_MAX_GROUP = 32
_GROUP_BYTES = 64 << 20
"""Bytes of observed tensors per run; samples are grouped up to it if the batch is dynamic."""


@dataclass
class Histogram:
    """The histogram of one tensor.

    Attributes:
        floor: values below it are masks.
        low, high: least and greatest value, and 0.
        zeros: how many were 0; ``counts`` of the others, in bins of equal width from low to high.
        ends: of each sample.
    """

    floor: float = -_AS_GOOD_AS_INFINITE
    low: float = 0.0
    high: float = 0.0
    zeros: int = 0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    ends: unseen_ends.Ends = field(default_factory=unseen_ends.Ends)

    def extend(self, values: Array) -> bool:
        """Update the range in the first pass; return False on NaN."""
        if values.size == 0:
            return True
        low, high = float(values.min()), float(values.max())
        if np.isnan(low) or np.isnan(high):
            return False
        if low < self.floor or high > _AS_GOOD_AS_INFINITE:
            values = values[(values >= self.floor) & (values <= _AS_GOOD_AS_INFINITE)]
            if values.size == 0:
                return True
            low, high = float(values.min()), float(values.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        return True

    def count(self, values: Array) -> None:
        """Count values in the second pass."""
        width = self.high - self.low
        if width <= 0.0:
            self.zeros += values.size
            return
        flat = values.ravel()
        if flat.size and (float(flat.min()) < self.low or float(flat.max()) > self.high):
            flat = flat[(flat >= self.low) & (flat <= self.high)]
        filled = flat[flat != 0]
        self.zeros += flat.size - filled.size
        # In float64: a subnormal width would overflow the quotient in float32.
        places = ((filled.astype(np.float64) - self.low) * (BINS / width)).astype(np.int64)
        self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)

    def range(
        self,
        *,
        method: RangeMethod,
        percentile: float,
        bits: int,
        symmetric: bool,
        beyond: bool = False,
        gate: tuple[flat_activations.Gate, ...] | None = None,
    ) -> tuple[float, float]:
        """Return the range that a method chooses; see :func:`observe`.

        Args:
            gate: what alone the tensor goes into, by :func:`kedge_targets.graph.flat_activations.gates`.
        """
        low, high = range_clipping.clip_range(
            self.low,
            self.high,
            self.counts,
            self.zeros,
            method=method,
            percentile=percentile,
            bits=bits,
            symmetric=symmetric,
        )
        if beyond and method is RangeMethod.MIN_MAX:
            low, high = self.ends.beyond(self.low, self.high)
            high = max(high, -low) if symmetric else high
            low = -high if symmetric else low
        if gate is not None:
            low = flat_activations.least(max(low, self.low), high, gate, levels=2**bits - 1)
            if symmetric:
                high = max(-low, min(high, self.high))
                low = -high
        return low, high


def observe(
    model: onnx.ModelProto,
    samples: Iterable[Sample],
    tensors: Sequence[str],
    *,
    method: RangeMethod = RangeMethod.MIN_MAX,
    percentile: float = 99.99,
    bits: int | Mapping[str, int] = 8,
    symmetric: bool | Collection[str] = False,
    beyond: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Return the range of each tensor over all samples.

    Args:
        model: a checked float graph; not changed. QONNX nodes must have been expanded.
        samples: input name → array, first axis the batch; iterated once for ``MIN_MAX``, else twice, so that an
            iterator will not do. A :class:`kedge_targets.contract.Calibration` fits. Samples of one shape are run
            together where the graph's batch is free; where it is fixed to more than comes, a sample is repeated.
        tensors: names of activations, inputs or constants; integers count as numbers.
        percentile: share of all values, in percent, that stay within a range of ``PERCENTILE``; what is cut off is
            taken from both ends alike, or, of a symmetric tensor, by magnitude.
        bits: that the range will be divided into by, for ``ENTROPY`` and ``MSE``; a mapping for single tensors
            (8 for those that it does not name).
        symmetric: all, none or these tensors: their range is (-m, m).
        beyond: with ``MIN_MAX``, let ranges reach as far as more samples would (:mod:`unseen_ends`).
        progress: is told ``calibrate``, samples done, samples in all (0 where that is not known).

    Returns:
        Name → (low, high) with low ≤ 0 ≤ high, finite, in the order of ``tensors``.

    Raises:
        DatasetError: there is no sample.
        ModelError: a tensor that the graph has not, or that becomes NaN; names the node that made it.
        TypeError: an iterator where two passes are needed.
    """
    found = histograms(model, samples, tensors, counts=method is not RangeMethod.MIN_MAX, progress=progress)
    flat = flat_activations.gates(model)
    made = {}
    for name in tensors:
        width = bits if isinstance(bits, int) else bits.get(name, 8)
        mirrored = symmetric if isinstance(symmetric, bool) else name in symmetric
        made[name] = found[name].range(
            method=method, percentile=percentile, bits=width, symmetric=mirrored, beyond=beyond, gate=flat.get(name)
        )
    return made


def histograms(
    model: onnx.ModelProto,
    samples: Iterable[Sample],
    tensors: Sequence[str],
    *,
    counts: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Histogram]:
    """Return histograms, from which every method can choose a range; arguments and errors as in :func:`observe`.

    Args:
        counts: whether values are counted, in a second pass; without it there are only the ends.
    """
    if counts and isinstance(samples, Iterator):
        raise TypeError("the samples are read twice, an iterator gives them once only")
    probe = _Probe(model, tensors)
    found = {
        name: Histogram(floor=attention.MASKED if name in probe.masked else -_AS_GOOD_AS_INFINITE) for name in tensors
    }
    count = getattr(samples, "samples", None)
    total = (count if isinstance(count, int) else 0) * (2 if counts else 1)
    done = 0
    for number in range(2 if counts else 1):
        for size, values in probe.run(samples):
            for name, array in values.items():
                if number:
                    found[name].count(array)
                elif not found[name].extend(array):
                    raise probe.not_a_number(name, done, done + size)
                else:
                    found[name].ends.add(array, size)
            done += size
            if progress is not None:
                progress("calibrate", done, total)
        if not done:
            raise DatasetError(
                "there is no sample to calibrate on", where="calibration", remedy="Give at least one sample"
            )
    return found


class _Probe:
    """A session that outputs the observed tensors."""

    def __init__(self, model: onnx.ModelProto, tensors: Sequence[str]) -> None:
        import onnx

        self._model = model
        self._maker = {tensor: node for node in model.graph.node for tensor in node.output if tensor}
        self._inputs = [info.name for info in signature.inputs(model)]
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._constants = {
            name: onnx.numpy_helper.to_array(constants[name]) for name in dict.fromkeys(tensors) if name in constants
        }
        self._given = [name for name in dict.fromkeys(tensors) if name in self._inputs]
        self._wanted = [
            name for name in dict.fromkeys(tensors) if name not in self._constants and name not in self._inputs
        ]
        for name in self._wanted:
            if name not in self._maker:
                raise ModelError("the graph has no such tensor", where=f"tensor {name!r}")
        # The node that is first in the graph is the one to blame for a NaN.
        place = {tensor: index for index, node in enumerate(model.graph.node) for tensor in node.output}
        self._wanted.sort(key=lambda name: place[name])
        before = set(attention.before_softmax(model))
        self.masked = {tensor for node in model.graph.node if node.name in before for tensor in node.output}
        self.masked |= {
            tensor
            for node in model.graph.node
            if node.name in before or node.op_type in ("Softmax", "LogSoftmax")
            for tensor in node.input
        }
        self._at_once = batch.size(model)
        self._session = self._opened() if self._wanted else None
        self._bytes = 0

    def _opened(self) -> Any:
        import onnx

        onnxruntime = library.load()
        wider = onnx.ModelProto()
        wider.CopyFrom(self._model)
        have = {value.name for value in wider.graph.output}
        wider.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name) for name in self._wanted if name not in have
        )
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        # Fusions would make other tensors than the graph has; "basic" keeps what is an output.
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return library.opened(wider.SerializeToString(), settings, where="graph with its tensors as outputs")

    def run(self, samples: Iterable[Sample]) -> Iterator[tuple[int, dict[str, Array]]]:
        """Run samples; return their number and their tensors."""
        first = True
        for size, feed in self._grouped(samples):
            values = dict(self._constants) if first else {}
            first = False
            values |= {name: np.asarray(feed[name]) for name in self._given}
            if self._session is not None:
                made = self._session.run(self._wanted, {name: feed[name] for name in self._inputs})
                values |= dict(zip(self._wanted, made, strict=True))
                self._bytes = sum(array.nbytes for array in made) // max(1, size)
            yield size, {name: _float(value) for name, value in values.items()}

    def _grouped(self, samples: Iterable[Sample]) -> Iterator[tuple[int, Sample]]:
        if self._at_once is not None:
            yield from ((self._at_once, feed) for feed in batch.regroup(_singles(samples), self._at_once))
            return
        self._bytes = _GROUP_BYTES  # the first runs alone and shows how large a sample is
        waiting: list[Sample] = []
        for sample in samples:
            if waiting and (_shapes(sample) != _shapes(waiting[0]) or self._full(waiting)):
                yield _joined(waiting)
                waiting = []
            waiting.append(sample)
        if waiting:
            yield _joined(waiting)

    def _full(self, waiting: list[Sample]) -> bool:
        rows = sum(_rows(sample) for sample in waiting)
        return rows >= min(_MAX_GROUP, int(_GROUP_BYTES // max(1, self._bytes)))

    def not_a_number(self, name: str, start: int, stop: int) -> ModelError:
        """Return the error for a tensor that became NaN."""
        node = self._maker.get(name)
        where = f"tensor {name!r}" if node is None else f"node {node.name!r} ({node.op_type}), tensor {name!r}"
        which = f"sample {start}" if stop - start == 1 else f"samples {start} to {stop - 1}"
        return ModelError(
            f"becomes NaN on {which} of the calibration",
            where=where,
            remedy="Look for a division by zero or a logarithm before this node, and for unusual samples",
        )


def _float(values: Array) -> Array:
    return values if values.dtype in (np.float32, np.float64) else values.astype(np.float32)


def _rows(sample: Sample) -> int:
    return len(next(iter(sample.values())))


def _shapes(sample: Sample) -> dict[str, tuple[int, ...]]:
    return {name: np.shape(array)[1:] for name, array in sample.items()}


def _joined(samples: list[Sample]) -> tuple[int, Sample]:
    rows = sum(_rows(sample) for sample in samples)
    if len(samples) == 1:
        return rows, samples[0]
    return rows, {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}


def _singles(samples: Iterable[Sample]) -> Iterator[dict[str, Array]]:
    """Yield single samples, whatever the batches."""
    return itertools.chain.from_iterable(
        ({name: array[row : row + 1] for name, array in sample.items()} for row in range(_rows(sample)))
        for sample in samples
    )

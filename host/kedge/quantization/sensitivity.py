"""Measures layer sensitivity: the error of each layer quantized on its own, at each precision.

One layer at a time is computed at the precision, all others in float, on calibration samples; the model's outputs are
compared with the float model's. The simulated rounding is the one that backends do
(:mod:`kedge_targets.graph.fakequant`), with activation ranges of the usual method (min-max for int8, least square error
for programmable logic).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions, groups, kinds, metric
from kedge.quantization.layer_perturbation import LayerPerturbation
from kedge.step import SampleSet
from kedge_protocol.errors import DatasetError
from kedge_protocol.progress import ignore_progress
from kedge_targets import free_lengths

if TYPE_CHECKING:
    import onnx

    from kedge.quantization.graph_partition import GraphPartition
    from kedge_targets.graph.layers import Layer
    from kedge_targets.numerics import Precision, QuantizationScheme

Array = npt.NDArray[Any]

LARGEST_DB = 150.0
"""Largest reported SQNR: above it float32 itself is the noise. The value of a layer that changes nothing."""
_CHUNK_BYTES = 192 << 20
"""Size of the tensors between the layers that are held at the same time."""
_MAX_CHUNK = 64
_FOR_RANGES = 0.4
"""Share of the time that finding ranges may take."""


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The sensitivity of one layer.

    Attributes:
        name, operator: of its node.
        weights: number of weights; 0 for a product of two activations.
        sqnr_db: precision → signal to quantization noise in dB, within ±:data:`LARGEST_DB`; lowest over the outputs and
            their groups of channels of similar range.
        drop: precision → share of answers lost; negative if some are gained; empty if there are no answers.
    """

    name: str
    operator: str
    weights: int
    sqnr_db: dict[str, float]
    drop: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The sensitivity of all layers, in the graph's order.

    Attributes:
        metric: of ``drop``: ``top1`` with labels, ``agreement`` with the float model's answers; ``sqnr`` if an output
            has no answers, or the user's metric is another: then layers are ranked by ``sqnr_db`` alone.
        samples: number of samples behind each figure.
        left_out: what was not measured and why, one sentence each.
    """

    metric: str
    samples: int
    layers: tuple[LayerSensitivity, ...]
    left_out: tuple[str, ...] = ()


def measure(
    model: onnx.ModelProto,
    samples: SampleSet,
    precisions: Sequence[Precision],
    *,
    quantized: QuantizationScheme | None = None,
    labels: Array | None = None,
    choice: metric.Choice | None = None,
    limit_samples: int = 64,
    seconds: float = 20.0,
    group_size: int = 32,
    asymmetric_weights: bool = True,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> Sensitivity:
    """Measure every layer (:func:`kedge_targets.graph.layers.layers`) at every precision that it supports.

    Samples are taken in chunks, each through all layers, so that every figure is over the same samples. If the time is
    up after the first chunk, the figures are over fewer samples than requested; if within the first chunk, the last
    layers are left out. Only calibration samples are used: evaluation samples must not decide anything.

    Args:
        model: the float graph with named nodes; not changed.
        precisions: the precisions to measure; float32 is left out.
        quantized: the scheme of int8.
        labels: of the samples; the first axis is the sample.
        choice: the metric of the compilation; None for one that suits the graph and the labels.
        limit_samples: largest number of samples, from the first on.
        seconds: approximate wall-clock time, including ranges and preparation, so that a little more may be used.
        group_size, asymmetric_weights, seed: for weights in low-bit storage.
        progress: called with ``sensitivity``, the number of measured figures and their total, in the first chunk.

    Raises:
        DatasetError: there is no sample.
        ModelError: ONNX Runtime rejects the model, or it becomes NaN on a sample; the error names the node.
    """
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="kedge-") as scratch:
        run = Run(model, precisions, quantized, group_size, asymmetric_weights, seed, Path(scratch))
    limited = Limited(samples, limit_samples)
    run.begin(limited, labels, choice)
    run.observe(limited, seconds=_FOR_RANGES * (end - time.monotonic()))
    return run.measure(limited, labels, end=end, progress=progress or ignore_progress)


class Limited:
    """The first samples of a set; iterating gives small batches."""

    def __init__(self, samples: SampleSet, limit: int) -> None:
        self._samples = samples
        self.samples = min(samples.samples, limit)

    def first(self, count: int) -> Limited:
        """Return the first of these samples."""
        return Limited(self._samples, min(self.samples, count))

    def batches(self, size: int) -> Iterator[tuple[int, dict[str, Array]]]:
        """Yield batches: the index of the first sample, and the arrays."""
        start = 0
        for batch in self._samples.batches(size):
            count = min(len(next(iter(batch.values()))), self.samples - start)
            yield start, {name: array[:count] for name, array in batch.items()}
            start += count
            if start >= self.samples:
                return

    def __iter__(self) -> Iterator[dict[str, Array]]:
        return (batch for _, batch in self.batches(16))


@dataclass
class _Figures:
    """Sums over samples for one layer at one precision."""

    signal: Array = field(default_factory=lambda: np.zeros(1))  # of each group
    noise: Array = field(default_factory=lambda: np.zeros(1))
    value: float = 0.0  # metric times samples

    def add(self, other: _Figures) -> None:
        self.signal = self.signal + other.signal
        self.noise = self.noise + other.noise
        self.value += other.value

    def sqnr_db(self) -> float:
        return min(map(_db, self.signal, self.noise), default=LARGEST_DB)


def _db(signal: float, noise: float) -> float:
    if not np.isfinite(noise):
        return -LARGEST_DB
    if noise == 0.0:
        return LARGEST_DB
    if signal == 0.0:
        return -LARGEST_DB
    return float(np.clip(10.0 * np.log10(signal / noise), -LARGEST_DB, LARGEST_DB))


@dataclass
class _Sums:
    """Sums over some samples: every figure, and the float model's own metric."""

    samples: int = 0
    reference: float = 0.0
    figures: dict[tuple[str, Precision], _Figures] = field(default_factory=dict)

    def add(self, other: _Sums) -> None:
        self.samples += other.samples
        self.reference += other.reference
        for key, figures in other.figures.items():
            self.figures.setdefault(key, _Figures()).add(figures)


class Run:
    """A graph whose layers are altered one at a time, for :func:`measure` and
    :mod:`kedge.quantization.layer_attribution`."""

    def __init__(
        self,
        model: onnx.ModelProto,
        precisions: Sequence[Precision],
        quantized: QuantizationScheme | None,
        group_size: int,
        asymmetric: bool,
        seed: int,
        scratch: Path,
    ) -> None:
        from kedge.quantization.graph_partition import GraphPartition
        from kedge_targets.graph import batch, layers, node_tracing, quantizer_preparation
        from kedge_targets.graph.wiring import Wiring

        # Backends fold constants and batch normalization into the weights first, and so do these figures.
        self._made = quantizer_preparation.prepare(model, scratch / "prepared.onnx", quantized=True)
        wiring = Wiring(self._made)
        here = {layer.name: layer for layer in layers.layers(self._made, wiring)}
        self._layers: list[tuple[str, Layer]] = []
        self.left_out: list[str] = []
        for layer in layers.layers(model):
            found = [name for name in node_tracing.trace_nodes([layer.name], model, self._made) if name in here]
            if found:
                self._layers.append((layer.name, here.pop(found[0])))
            else:
                self.left_out.append(f"{layer.name}: nothing of it is left once the graph is optimized")
        weights = {
            layer.weight: value
            for _, layer in self._layers
            if layer.weight is not None and (value := wiring.constant(layer.weight)) is not None
        }
        self._at_once = batch.size(self._made)
        self._took, self._held = 0.0, 0
        self._behind = kinds.graph_evidence(model)
        self._choice: metric.Choice | None = None
        self._kinds: dict[str, kinds.ClassifiedOutput] = {}
        self._groups: list[tuple[str, groups.Group]] = []
        self._partition: GraphPartition = GraphPartition(self._made, [layer for _, layer in self._layers], weights)
        self._perturbation = LayerPerturbation(
            self._made,
            weights,
            precisions,
            quantized=quantized,
            group_size=group_size,
            asymmetric=asymmetric,
            seed=seed,
        )

    def begin(self, samples: Limited, labels: Array | None, choice: metric.Choice | None) -> None:
        """Run one sample to find out how long that takes and what the outputs are."""
        if not samples.samples:
            raise DatasetError(
                "there is no sample to measure on", where="calibration", remedy="Give at least one sample"
            )
        _, feeds = next(samples.batches(1))
        self._partition.run(feeds)  # makes the sessions
        began = time.monotonic()
        made = self._partition.run(feeds)
        self._took = max(1e-6, time.monotonic() - began)
        self._held = sum(array.nbytes for array in made.values())
        outputs = {name: made[name] for name in self._partition.outputs}
        self._kinds = kinds.classify_outputs(
            outputs, graph=self._behind, inputs=feeds, labels=None if labels is None else labels[:1]
        )
        self._choice = self._judged(outputs, None if labels is None else labels[:1], choice)

    def _judged(
        self, outputs: dict[str, Array], labels: Array | None, choice: metric.Choice | None
    ) -> metric.Choice | None:
        """Return the metric that counts right answers: top-1, or agreement, of one output; None if there are no
        answers."""
        if choice is None:
            kind = metric.usual(self._kinds, outputs, labels)
            if kind not in metric.OF_ANSWERS:
                return None
            return metric.choose(kind, kinds=self._kinds, reference=outputs, labels=labels)
        if not choice.of_answers:
            return None
        self._kinds = choice.seen
        known = labels is not None and choice.kind == "top1"
        several = () if known else choice.outputs
        named = choice.output or (None if several else next(iter(decisions.answering(self._kinds))))
        return metric.Choice(
            kind="top1" if known else "agreement",
            name="",
            output=named,
            outputs=several,
            kinds=tuple(self._kinds.values()),
        )

    def observe(self, samples: Limited, *, seconds: float) -> None:
        """Find the ranges of activations, on as many samples as time allows."""
        passes = self._perturbation.passes
        if not passes:
            return
        affordable = max(1, int(seconds / self._took / passes))
        if affordable < samples.samples:
            self.left_out.append(f"ranges of activations are those of {affordable} of {samples.samples} samples")
        self._perturbation.observe(samples.first(affordable))

    def measure(
        self, samples: Limited, labels: Array | None, *, end: float, progress: Callable[[str, int, int], None]
    ) -> Sensitivity:
        wanted = [
            (name, layer, precision) for name, layer in self._layers for precision in self._perturbation.of(layer)
        ]
        size = self._size(len(wanted), end - time.monotonic())
        sums = _Sums()
        missing: list[str] = []
        for start, feeds in samples.batches(size):
            part = self._part(feeds, None if labels is None else labels[start:])
            for number, (name, layer, precision) in enumerate(wanted):
                if time.monotonic() > end and (sums.samples or number):
                    missing = [] if sums.samples else [f"{n}: {p.value}" for n, _, p in wanted[number:]]
                    break
                part.figure(name, layer, precision)
                if not sums.samples:
                    progress("sensitivity", number + 1, len(wanted))
            else:
                sums.add(part.sums)
                continue
            if not sums.samples:
                sums.add(part.sums)
            break
        if missing:
            self.left_out.append(f"the time was up before {', '.join(missing)}")
        if sums.samples < samples.samples:
            self.left_out.append(f"the time was up after {sums.samples} of {samples.samples} samples")
        return self._told(sums)

    def _size(self, figures: int, seconds: float) -> int:
        """Return how many samples to run together."""
        if self._at_once == 1:
            return 1
        # On the way from a layer to the outputs lies half of the graph, on average.
        affordable = int(0.7 * seconds / (self._took * (1 + figures / 2)))
        return max(1, min(_MAX_CHUNK, _CHUNK_BYTES // max(1, self._held), affordable))

    def _part(self, feeds: dict[str, Array], labels: Array | None) -> _Part:
        clean = self._partition.run(feeds)
        if not self._groups:  # the first part's are those of all
            self._groups = [
                (name, group)
                for name in self._partition.outputs
                if clean[name].dtype.kind == "f" and self._kinds[name].kind is not kinds.OutputKind.PASSED_THROUGH
                for group in groups.of(clean[name], bounded=self._kinds[name].bounded)
            ]
        return _Part(self._partition, self._perturbation, feeds, clean, labels, self._choice, self._groups)

    def errors(self, feeds: dict[str, Array], precision: Precision, *, end: float) -> Iterator[tuple[str, Array]]:
        """Alter each layer alone, until ``end``: yield its name, and the error of each sample in the group of channels
        where it is largest, as noise over signal.

        Args:
            feeds: the samples, as the model takes them.
        """
        part = self._part(feeds, None)
        for name, layer in self._layers:
            if time.monotonic() > end:
                return
            if precision in self._perturbation.of(layer):
                yield name, part.errors(layer, precision)

    def _told(self, sums: _Sums) -> Sensitivity:
        told = []
        for name, layer in self._layers:
            figures = {
                precision: sums.figures[name, precision]
                for precision in self._perturbation.of(layer)
                if (name, precision) in sums.figures
            }
            told.append(
                LayerSensitivity(
                    name=name,
                    operator=layer.operator,
                    weights=layer.size,
                    sqnr_db={precision.value: round(one.sqnr_db(), 3) for precision, one in figures.items()},
                    drop={
                        precision.value: round((sums.reference - one.value) / sums.samples, 9)
                        for precision, one in figures.items()
                        if self._choice is not None
                    },
                )
            )
        told_of = "sqnr" if self._choice is None else self._choice.kind
        return Sensitivity(metric=told_of, samples=sums.samples, layers=tuple(told), left_out=tuple(self.left_out))


class _Part:
    """Some samples, run once in float and then with each layer altered in turn."""

    def __init__(
        self,
        partition: GraphPartition,
        perturbation: LayerPerturbation,
        feeds: dict[str, Array],
        clean: dict[str, Array],
        labels: Array | None,
        choice: metric.Choice | None,
        parts: list[tuple[str, groups.Group]],
    ) -> None:
        self._partition = partition
        self._perturbation = perturbation
        self._clean = clean
        self._groups = parts
        self._reference = {name: self._clean[name] for name in partition.outputs}
        self._count = len(next(iter(feeds.values())))
        self._labels = None if labels is None else np.asarray(labels[: self._count])
        self._choice = choice
        self._signal = np.array([float(np.square(v, dtype=np.float64).sum()) for v in self._numbers(self._reference)])
        self.sums = _Sums(samples=self._count, reference=self._score(self._reference))

    def figure(self, name: str, layer: Layer, precision: Precision) -> None:
        """Measure one layer at one precision."""
        changes, half = self._perturbation.changes(layer, precision, self._clean)
        outputs = self._fitted(self._partition.changed(layer, self._clean, changes, half=half))
        with np.errstate(invalid="ignore", over="ignore"):
            noise = np.array(
                [
                    float(np.square(np.subtract(value, wanted, dtype=np.float64)).sum())
                    for value, wanted in zip(self._numbers(outputs), self._numbers(self._reference), strict=True)
                ]
            )
        self.sums.figures[name, precision] = _Figures(signal=self._signal, noise=noise, value=self._score(outputs))

    def errors(self, layer: Layer, precision: Precision) -> Array:
        """Return the N errors; see :meth:`Run.errors`."""
        changes, half = self._perturbation.changes(layer, precision, self._clean)
        outputs = self._fitted(self._partition.changed(layer, self._clean, changes, half=half))
        found = np.zeros(self._count)
        for value, wanted in zip(self._numbers(outputs), self._numbers(self._reference), strict=True):
            if not wanted.size:
                continue
            with np.errstate(invalid="ignore", over="ignore"):
                noise = np.square(np.subtract(value, wanted, dtype=np.float64)).reshape(self._count, -1).mean(axis=1)
            signal = float(np.square(wanted, dtype=np.float64).mean()) or 1.0
            found = np.maximum(found, np.nan_to_num(noise / signal, nan=np.inf))
        return found

    def _fitted(self, outputs: dict[str, Array]) -> dict[str, Array]:
        """Fit outputs of free length to the number of rows of the float graph's."""
        return {name: free_lengths.fitted(outputs[name], wanted) for name, wanted in self._reference.items()}

    def _numbers(self, outputs: dict[str, Array]) -> list[Array]:
        return [group.of(outputs[name]) for name, group in self._groups]

    def _score(self, outputs: dict[str, Array]) -> float:
        if self._choice is None:
            return 0.0
        rows = self._choice.rows(outputs, self._reference, self._labels)
        return 0.0 if rows is None else float(rows.sum()) / max(1, len(self._choice.outputs))

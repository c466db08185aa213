"""The numerics that a backend declares, and the quantization plan that the host makes from them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class Family(str, enum.Enum):
    """How a precision is implemented. One plan holds one family besides float32."""

    FABRIC = "fabric"  # integers of few bits throughout, as programmable logic computes them
    WEIGHTS = "weights"  # weights are stored small and read back as float; sums are float
    STATIC = "static"  # integers, activations in ranges that calibration saw
    DYNAMIC = "dynamic"  # integers, activations in ranges that are found in each call
    HALF = "half"
    FLOAT = "float"


class Precision(str, enum.Enum):
    """The number format that a layer computes in, ordered from small to large."""

    W2A2 = "w2a2"
    W3A3 = "w3a3"
    W4A4 = "w4a4"
    W8A8 = "w8a8"
    INT4 = "int4"
    CODEBOOK4 = "codebook4"
    LOG4 = "log4"
    CODEBOOK8 = "codebook8"
    LOG8 = "log8"
    INT8 = "int8"
    INT8_DYNAMIC = "int8-dynamic"
    INT16 = "int16"  # activations; weights have 8 bits
    FLOAT16 = "float16"
    FLOAT32 = "float32"

    @property
    def family(self) -> Family:
        """The family that implements the precision."""
        return _FACTS[self][0]

    @property
    def weight_bits(self) -> int:
        """Bits of one stored weight (scales and tables not counted)."""
        return _FACTS[self][1]

    @property
    def activation_bits(self) -> int | None:
        """Bits of one activation; None where activations are float."""
        return _FACTS[self][2]

    @property
    def needs_calibration(self) -> bool:
        """Whether lowering to it reads calibration samples."""
        return self.family in (Family.FABRIC, Family.STATIC)

    @property
    def quantized(self) -> bool:
        """Whether its numbers are coarse enough to notice: weights of 8 bits or fewer."""
        return self.family not in (Family.HALF, Family.FLOAT)


_FACTS: dict[Precision, tuple[Family, int, int | None]] = {
    Precision.W2A2: (Family.FABRIC, 2, 2),
    Precision.W3A3: (Family.FABRIC, 3, 3),
    Precision.W4A4: (Family.FABRIC, 4, 4),
    Precision.W8A8: (Family.FABRIC, 8, 8),
    Precision.INT4: (Family.WEIGHTS, 4, None),
    Precision.CODEBOOK4: (Family.WEIGHTS, 4, None),
    Precision.LOG4: (Family.WEIGHTS, 4, None),
    Precision.CODEBOOK8: (Family.WEIGHTS, 8, None),
    Precision.LOG8: (Family.WEIGHTS, 8, None),
    Precision.INT8: (Family.STATIC, 8, 8),
    Precision.INT8_DYNAMIC: (Family.DYNAMIC, 8, 8),
    Precision.INT16: (Family.STATIC, 8, 16),
    Precision.FLOAT16: (Family.HALF, 16, None),
    Precision.FLOAT32: (Family.FLOAT, 32, None),
}


class Granularity(str, enum.Enum):
    """How many scales a weight tensor has."""

    PER_TENSOR = "per-tensor"
    PER_CHANNEL = "per-channel"


class RangeMethod(str, enum.Enum):
    """How calibration finds the range of an activation."""

    MIN_MAX = "min-max"  # all that was seen
    PERCENTILE = "percentile"  # all but a share of the values
    ENTROPY = "entropy"  # least Kullback-Leibler divergence (Migacz, "8-bit Inference with TensorRT", GTC 2017)
    MSE = "mse"  # least mean square error of the quantized values


class Reach(str, enum.Enum):
    """How far a backend lets the ranges of tensors with few values reach, where calibration takes all that it saw."""

    OBSERVED = "observed"  # as far as calibration saw
    GUARDED = "guarded"  # further in files that no search holds against other samples (:attr:`Plan.guard`)
    FURTHER = "further"  # as far as more samples would (:mod:`kedge_targets.graph.unseen_ends`)


@dataclass(frozen=True, kw_only=True)
class QuantizationScheme:
    """One int8 quantization scheme of a backend.

    Attributes:
        activation: ``int8`` or ``uint8``.
        weight: ``int8`` or ``uint8``.
        symmetric_activation: zero-point fixed at the middle.
        granularity: of the weights.
        reduced_range: weights use 7 bits, so that processors without VNNI do not saturate their 16-bit sums.
        products: products of two activations (attention) are integers too; else they stay in float, unless
            :attr:`Plan.layers` names them.
        reach: how far the ranges of activations reach; a simulation follows it.
    """

    activation: str
    weight: str
    symmetric_activation: bool
    granularity: Granularity
    reduced_range: bool = False
    products: bool = True
    reach: Reach = Reach.OBSERVED

    def reaches_further(self, *, guard: bool) -> bool:
        """Return whether ranges reach beyond what calibration saw, with or without :attr:`Plan.guard`."""
        return self.reach is Reach.FURTHER or (guard and self.reach is Reach.GUARDED)


@dataclass(frozen=True, kw_only=True)
class Numerics:
    """The numerics that a backend declares.

    Attributes:
        precisions: that it can lower a whole graph to.
        quantized: its ways of int8, best first.
        layers: precisions that single layers may have beside int8, and that no whole graph has.
        mixed: whether single layers may have another precision than the rest: float32 beside any other, and those of
            family ``fabric`` or ``weights`` among themselves.
        layouts: of 4-D activations in its own files (``NCHW``, ``NHWC``).
        operators: ONNX operators (default domain) that it takes; None where only its toolchain knows.
        range_methods: of calibration, for the families ``static`` and ``fabric``.
        fixed_ranges: whether it takes :attr:`Plan.ranges`.
        quantized_graphs: whether it takes a graph with QONNX's ``Quant`` nodes as it is.
    """

    precisions: tuple[Precision, ...]
    schemes: tuple[QuantizationScheme, ...]
    mixed: bool
    layouts: tuple[str, ...]
    layers: tuple[Precision, ...] = ()
    operators: frozenset[str] | None = None
    range_methods: tuple[RangeMethod, ...] = (RangeMethod.MIN_MAX,)
    fixed_ranges: bool = False
    quantized_graphs: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The quantization plan of one graph, decided by the host.

    Attributes:
        default: precision of every layer that ``layers`` does not name.
        layers: node name → precision.
        quantized: the way of int8, where any layer is int8.
        range_method: of calibration, where a precision needs one.
        percentile: of all values that a range holds, for :attr:`RangeMethod.PERCENTILE`.
        ranges: tensor name → (low, high) that was decided already (learnt in fine-tuning); calibration decides the
            rest. Names that the backend's own form of the graph has not are left out.
        group_size: weights that share one scale, for weights of 4 bits.
        asymmetric_weights: with a zero-point for each group, for ``int4``.
        guard: the backend may leave further layers in float where an output would not hold otherwise
            (:mod:`kedge_targets.graph.output_guard`); a search finds out for itself.
    """

    default: Precision
    layers: dict[str, Precision] = field(default_factory=dict)
    scheme: QuantizationScheme | None = None
    range_method: RangeMethod = RangeMethod.MIN_MAX
    percentile: float = 99.99
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    group_size: int = 32
    asymmetric_weights: bool = True
    guard: bool = False

    @property
    def precisions(self) -> frozenset[Precision]:
        """All precisions in the plan."""
        return frozenset((self.default, *self.layers.values()))

    @property
    def quantizes(self) -> bool:
        """Whether any layer's numbers have at most 256 levels."""
        return any(precision.quantized for precision in self.precisions)

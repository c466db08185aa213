"""Counts the number formats of a lowered file, and gives the precision name that is true of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from kedge_targets.numerics import Family, Precision

MIXED = "mixed"
"""Integers beside floats, neither nine tenths of the weights and of the multiplications."""
MOST = 0.9
"""Share of the weight bytes, and of the multiply-accumulates, from which a name of integers is true."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The number formats of a file.

    Attributes:
        weight_bytes: numpy dtype (``int4`` and ``uint4`` among them) → bytes of the weights that are stored so; scales,
            zero-points and biases are no weights.
        macs: multiply-accumulates of one sample.
        integer_macs: those whose factors are both integers.
        dynamic_macs: those of them whose activations a file rounds by the range of each call.
        rounds: whether anything at all is quantized.
    """

    weight_bytes: dict[str, int] = field(default_factory=dict)
    macs: int = 0
    integer_macs: int = 0
    dynamic_macs: int = 0
    rounds: bool = False

    @property
    def weights_in_integers(self) -> float | None:
        """Share of the weight bytes; None without weights."""
        return self._share(("int", "uint"))

    @property
    def weights_in_half(self) -> float | None:
        """Share of the weight bytes that are float16 or bfloat16; None without weights."""
        return self._share(("float16", "bfloat16"))

    @property
    def macs_in_integers(self) -> float | None:
        """Share of the multiply-accumulates in integers; None without any."""
        return self.integer_macs / self.macs if self.macs else None

    def _share(self, kinds: tuple[str, ...]) -> float | None:
        total = sum(self.weight_bytes.values())
        found = sum(size for kind, size in self.weight_bytes.items() if kind.startswith(kinds))
        return found / total if total else None


def true_name(precision: Precision, numbers: Numbers | None) -> str:
    """Return the true precision name of a file.

    A name of 8-bit integers is true where :data:`MOST` of the weight bytes and of the multiply-accumulates are so; a
    name of few bits or of float16 where any weight is stored so. A file in which nothing is so is called by what it is.

    Args:
        precision: that was asked for.
        numbers: of the file; None where the backend cannot count them, which leaves the name as it was asked for.
    """
    if numbers is None or precision.family is Family.FABRIC:
        return str(precision.value)
    integers, half = numbers.weights_in_integers or 0.0, numbers.weights_in_half or 0.0
    if (precision.family is Family.WEIGHTS and integers) or (precision is Precision.FLOAT16 and half):
        return str(precision.value)
    shares = [one for one in (numbers.weights_in_integers, numbers.macs_in_integers) if one is not None]
    if numbers.rounds and not any(share < MOST for share in shares):
        found = precision if precision.family in (Family.STATIC, Family.DYNAMIC) else Precision.INT8
        if 2 * numbers.dynamic_macs > numbers.integer_macs:  # a file that was so before
            found = Precision.INT8_DYNAMIC
    elif numbers.rounds:
        return MIXED
    else:
        found = Precision.FLOAT16 if half >= MOST else Precision.FLOAT32
    return str(found.value)

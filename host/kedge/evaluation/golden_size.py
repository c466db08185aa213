"""Limits the size of golden vectors and chooses a form that keeps the limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import TensorSpec
from kedge_protocol.golden_coding import CodedInput, code

Array = npt.NDArray[Any]

LEAST_BYTES = 64 << 10
_SHARE = 10
_OVERHEAD = 4 << 10
"""Of the archive: headers and names."""
_CHECKSUMS = (4096, 1024, 256, 64)
_FORMS = (
    (16, False, 1), (16, True, 1), (8, True, 1), (8, True, 2), (8, True, 4), (8, True, 8), (4, True, 8), (4, True, 16),
    (2, True, 16), (2, True, 32), (1, True, 32),
)  # fmt: skip
_RUN_BYTES = 256 << 20
"""Of all candidates' inputs and outputs together."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """The form in which vectors are stored.

    Attributes:
        samples: at most.
        eight_bits, step: of the inputs, see :func:`kedge_protocol.golden_coding.code`.
        checksums: output → number of sums for each sample, where the output is not stored itself.
    """

    samples: int
    eight_bits: bool = False
    step: int = 1
    checksums: Mapping[str, int]

    @property
    def words(self) -> str:
        """Describe the reduction for the report; empty if nothing was reduced."""
        parts = ["inputs in 8 bits"] if self.eight_bits else []
        parts += [f"every {self.step}th value of long axes"] if self.step > 1 else []
        parts += [f"checksums of {name}" for name in self.checksums]
        return ", ".join(parts)

    def coded(self, raw: Mapping[str, Array]) -> dict[str, CodedInput]:
        """Return the inputs that can be stored in a small form."""
        if not self.eight_bits and self.step == 1:
            return {}
        return {name: code(array, eight_bits=self.eight_bits, step=self.step) for name, array in raw.items()}


def budget(model_bytes: int) -> int:
    """Return the size limit, in bytes, of golden vectors: a tenth of the model's files or 64 KiB, whichever is
    larger."""
    return max(LEAST_BYTES, model_bytes // _SHARE)


def form(raw: Mapping[str, Array], outputs: Sequence[Array], specs: Sequence[TensorSpec], *, most: int) -> Form:
    """Return the first form that fits, from whole samples to smaller and smaller ones; the smallest if none fits.

    Args:
        raw: one sample of each input, first axis the sample.
        outputs: of that sample, in the order of ``specs``.
        most: bytes.
    """
    last = Form(samples=1, checksums={})
    for samples, eight_bits, step in _FORMS:
        left = (
            most
            - _OVERHEAD
            - samples
            * sum(
                code(array, eight_bits=eight_bits, step=step).codes.nbytes if eight_bits else array.nbytes
                for array in raw.values()
            )
        )
        for count in (None, *_CHECKSUMS):
            sums = {} if count is None else _summed(outputs, specs, count)
            size = samples * sum(
                8 * sums[spec.name] if spec.name in sums else output.nbytes
                for output, spec in zip(outputs, specs, strict=True)
            )
            last = Form(samples=samples, eight_bits=eight_bits, step=step, checksums=sums)
            if size <= left:
                return last
    return last


def _summed(outputs: Sequence[Array], specs: Sequence[TensorSpec], count: int) -> dict[str, int]:
    """Outputs of a fixed length with more elements than checksums."""
    return {
        spec.name: count
        for output, spec in zip(outputs, specs, strict=True)
        if output.size > 2 * count and spec.batched and None not in spec.shape[1:]
    }


def candidates(raw: Mapping[str, Array], outputs: Sequence[Array], wanted: int, least: int) -> int:
    """Return how many candidates to run; fewer if they are large."""
    one = sum(array.nbytes for array in (*raw.values(), *outputs))
    return int(np.clip(_RUN_BYTES // max(1, one), least, wanted))

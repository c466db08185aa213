"""The calibration samples as training uses them: accessible in any order, with some held out for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kedge.step import SampleSet
from kedge_protocol.errors import DatasetError

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor

MOST_BYTES = 1 << 30
"""Memory for samples; of a larger set only the samples that fit are used, evenly spread."""
_CHUNK = 256
_FEWEST_TO_SPLIT = 5


class Pool:
    """The samples of a training, in memory.

    Args:
        samples: the calibration samples.
        labels: their labels, or None; the first axis is the sample.
        held_back: share of the samples held out for evaluation.
        seed: of the split.

    Attributes:
        training, judging: indices of the samples for training and for evaluation; both hold all samples if
            there are too few to split.
        left_out: number of samples that did not fit into memory.

    Raises:
        DatasetError: there are no samples, or the number of labels differs.
    """

    def __init__(self, samples: SampleSet, labels: Array | None, *, held_back: float, seed: int) -> None:
        total = samples.samples
        if not total:
            raise DatasetError("holds no samples", where="calibration")
        if labels is not None and len(labels) != total:
            raise DatasetError(
                f"has {len(labels)} labels for {total} samples", where="calibration", remedy="Give one for each sample"
            )
        parts: dict[str, list[Array]] = {}
        chosen: list[Array] = []
        stride, begun = 1, 0
        for batch in samples.batches(_CHUNK):
            rows = len(next(iter(batch.values())))
            if not chosen:
                each = sum(array.nbytes for array in batch.values()) / max(1, rows)
                stride = max(1, -(-int(each * total) // MOST_BYTES))
            picked = np.arange(-begun % stride, rows, stride)
            chosen.append(begun + picked)
            for name, array in batch.items():
                parts.setdefault(name, []).append(np.array(array[picked]))
            begun += rows
        for name, arrays in parts.items():
            if len({array.shape[1:] for array in arrays}) > 1:
                raise DatasetError(
                    f"the samples of {name!r} differ in length, and training takes batches of one",
                    where="calibration",
                    remedy="Give samples of one length",
                )
        places = np.concatenate(chosen)
        self.arrays = {name: np.concatenate(arrays) for name, arrays in parts.items()}
        self.labels = None if labels is None else np.asarray(labels)[places]
        self.count = len(places)
        self.left_out = total - self.count
        order = np.random.default_rng([seed, 1]).permutation(self.count)
        judged = round(self.count * held_back) if self.count >= _FEWEST_TO_SPLIT else 0
        self.judging: Array = np.sort(order[:judged]) if judged else np.arange(self.count)
        self.training: Array = np.sort(order[judged:]) if judged else np.arange(self.count)

    @property
    def split(self) -> bool:
        """Return whether evaluation uses other samples than training."""
        return len(self.training) + len(self.judging) == self.count and self.count > 1

    def feeds(self, picked: Sequence[int] | Array) -> dict[str, Tensor]:
        """Return the samples at the indices, by input name."""
        return {name: torch.from_numpy(array[picked]) for name, array in self.arrays.items()}

    def labels_of(self, picked: Sequence[int] | Array) -> Tensor | None:
        """Return the labels at the indices."""
        return None if self.labels is None else torch.from_numpy(self.labels[picked])

    def digest(self) -> str:
        """Return the digest of all samples and labels, in hex."""
        found = hashlib.sha256()
        for name, array in sorted(self.arrays.items()):
            found.update(f"{name}{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).data)
        if self.labels is not None:
            found.update(np.ascontiguousarray(self.labels).tobytes())
        return found.hexdigest()


def mixed(feeds: Mapping[str, Tensor], random: np.random.Generator) -> dict[str, Tensor]:
    """Blend samples with one another (Zhang et al., "mixup", 2018); the teacher gives the targets of the blends.
    Integer inputs (tokens, masks) cannot be blended: if there is one, the samples are returned unchanged."""
    if any(not tensor.is_floating_point() for tensor in feeds.values()):
        return dict(feeds)
    count = len(next(iter(feeds.values())))
    order = torch.from_numpy(random.permutation(count))
    share = torch.from_numpy(random.beta(1.0, 1.0, count).astype(np.float32))
    made = {}
    for name, tensor in feeds.items():
        part = share.to(tensor.dtype).reshape(-1, *[1] * (tensor.ndim - 1))
        made[name] = tensor * part + tensor[order] * (1 - part)
    return made


def moved(feeds: Mapping[str, Tensor], random: np.random.Generator, reach: float = 0.125) -> dict[str, Tensor]:
    """Shift images by up to ``reach`` of their size, extending their edges; other inputs are unchanged.

    An image is a float tensor of four axes with at most four channels (axis 1 or the last).
    """
    made = dict(feeds)
    for name, tensor in feeds.items():
        axes = _picture_axes(tensor)
        if axes is None:
            continue
        rows = []
        for row in tensor:
            for axis in axes:
                size = tensor.shape[axis]
                most = int(size * reach)
                shift = int(random.integers(-most, most + 1))
                row = row.index_select(axis - 1, (torch.arange(size) + shift).clamp(0, size - 1))
            rows.append(row)
        made[name] = torch.stack(rows)
    return made


def _picture_axes(tensor: Tensor) -> tuple[int, int] | None:
    if tensor.ndim != 4 or not tensor.is_floating_point():
        return None
    if tensor.shape[1] <= 4:
        return (2, 3)
    return (1, 2) if tensor.shape[3] <= 4 else None

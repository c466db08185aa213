"""Small float networks for programmable logic, trained in seconds: one on scikit-learn's digits, one on MNIST."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kedge.demo import digits
from kedge_targets.contract import Lowered
from kedge_targets.numerics import Plan, Precision, RangeMethod
from tests.support import lowering

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Samples:
    """What training is given."""

    images: Array

    @property
    def samples(self) -> int:
        return len(self.images)

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        for start in range(0, len(self.images), size):
            yield {"image": self.images[start : start + size]}


@dataclass(frozen=True)
class Trained:
    """A float network with its data: trained on ``train``, judged on ``held_out``."""

    graph: Path
    train: Array
    train_label: Array
    held_out: Array
    held_out_label: Array

    @property
    def top1(self) -> float:
        return lowering.top1(lowering.float_answers(self.graph, self.held_out), self.held_out_label)

    def lowered(self, graph: Path, precision: Precision, folder: Path) -> Lowered:
        plan = Plan(default=precision, range_method=RangeMethod.MSE)
        calibration = lowering.Calibration("image", self.train[:300])
        return lowering.lower("pynq-z2", graph, plan, calibration, folder)

    def drop(self, lowered: Lowered) -> float:
        (answers,) = lowering.executor("pynq-z2", lowered)({"image": self.held_out}).values()
        return self.top1 - lowering.top1(answers, self.held_out_label)


def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU()]


def fitted(layers: list[nn.Module], data: tuple[Array, Array, Array, Array], folder: Path, *, epochs: int) -> Trained:
    train, label, _, _ = data
    net = nn.Sequential(*layers)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    images, labels = torch.from_numpy(train), torch.from_numpy(label)
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    net.eval()
    path = folder / "float.onnx"
    torch.onnx.export(
        net, (images[:2],), str(path), dynamo=True, external_data=False, input_names=["image"],
        output_names=["scores"], dynamic_shapes=({0: "samples"},), verbose=False,
    )  # fmt: skip
    return Trained(path, *data)


def digits_network(folder: Path, shared_data: Path | None) -> Trained:
    data = digits.load()
    split = (data.train / 16, data.train_label, data.held_out / 16, data.held_out_label)
    layers = [*block(1, 16), nn.MaxPool2d(2), *block(16, 32), nn.Flatten(), nn.Linear(512, 32), nn.ReLU()]
    return fitted([*layers, nn.Linear(32, 10)], split, folder, epochs=12)


def mnist_network(folder: Path, shared_data: Path | None) -> Trained:
    assert shared_data is not None
    with np.load(shared_data / "eval/mnist_t10k_uint8.npz") as arrays:
        images, label = arrays["input"].astype(np.float32) / 255, arrays["label"].astype(np.int64)
    split = (images[:6000], label[:6000], images[7000:], label[7000:])
    layers = [*block(1, 8, stride=2), *block(8, 16), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(784, 32), nn.ReLU()]
    return fitted([*layers, nn.Linear(32, 10)], split, folder, epochs=5)

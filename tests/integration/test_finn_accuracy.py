"""Networks of our own on programmable logic: 4 bits by calibration alone, 2 bits after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.support import lowering, toolchains
from torch import nn

from kedge.compression.step import Context
from kedge.compression.steps.fine_tune import FineTune, FineTuneOptions
from kedge.demo import digits
from kedge_targets.contract import Lowered
from kedge_targets.graph import reading, writing
from kedge_targets.numerics import Plan, Precision, RangeMethod

Array = npt.NDArray[Any]

W4A4_DROP, W2A2_DROP = 0.01, 0.03


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    toolchains.required("finn")


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


CASES = [
    pytest.param((digits_network, 1500), id="digits"),
    pytest.param((mnist_network, 1200), id="mnist", marks=pytest.mark.shared_data),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, int]:
    make: Callable[[Path, Path | None], Trained]
    make, steps = request.param
    shared = request.getfixturevalue("shared_data") if make is mnist_network else None
    torch.manual_seed(0)
    return make(tmp_path_factory.mktemp("network"), shared), steps


def test_four_bits_by_calibration_alone(case: tuple[Trained, int], tmp_path: Path) -> None:
    trained, _ = case
    lowered = trained.lowered(trained.graph, Precision.W4A4, tmp_path / "lowered")
    assert lowered.calibration_samples == 300
    assert trained.top1 > 0.96
    assert trained.drop(lowered) <= W4A4_DROP


def test_two_bits_after_fine_tuning(case: tuple[Trained, int], tmp_path: Path) -> None:
    trained, steps = case
    model = reading.read(trained.graph)
    context = Context(
        teacher=model,
        samples=Samples(trained.train),
        plan=Plan(default=Precision.W2A2, range_method=RangeMethod.MSE),
        workdir=tmp_path,
        labels=trained.train_label,
        seed=1,
    )
    tuned = FineTune(FineTuneOptions(steps=steps, batch=64)).apply(model, context)
    writing.save(tuned, tmp_path / "tuned.onnx")
    lowered = trained.lowered(tmp_path / "tuned.onnx", Precision.W2A2, tmp_path / "lowered")
    assert lowered.precision == "w2a2"
    assert trained.drop(lowered) <= W2A2_DROP

"""Networks of our own on programmable logic: 4 bits by calibration alone, 2 bits after fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import toolchains
from tests.support.exactness import assert_exact
from tests.support.small_networks import Samples, Trained, digits_network, mnist_network

from kedge.step import Context
from kedge.steps.fine_tune import FineTune, FineTuneOptions
from kedge_targets.graph import model_reader, model_writer
from kedge_targets.numerics import Plan, Precision, RangeMethod

W4A4_DROP, W2A2_DROP = 0.01, 0.03


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    toolchains.required("finn")


CASES = [
    pytest.param((digits_network, 1500, 200), id="digits"),
    pytest.param((mnist_network, 1200, 1000), id="mnist", marks=[pytest.mark.shared_data, pytest.mark.campaign]),
]


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, int, int]:
    """A network, steps of its fine-tuning, and samples on which integers are compared one by one."""
    make: Callable[[Path, Path | None], Trained]
    make, steps, samples = request.param
    shared = request.getfixturevalue("shared_data") if make is mnist_network else None
    torch.manual_seed(0)
    return make(tmp_path_factory.mktemp("network"), shared), steps, samples


def test_four_bits_by_calibration_alone(case: tuple[Trained, int, int], tmp_path: Path) -> None:
    trained, _, samples = case
    lowered = trained.lowered(trained.graph, Precision.W4A4, tmp_path / "lowered")
    assert lowered.calibration_samples == 300
    assert trained.top1 > 0.96
    assert trained.drop(lowered) <= W4A4_DROP
    # Many of the digits' pixels lie halfway between two levels of the first quantizer: there too it is exact.
    assert_exact(lowered, np.concatenate([trained.held_out, trained.train])[:samples], tmp_path)


def test_two_bits_after_fine_tuning(case: tuple[Trained, int, int], tmp_path: Path) -> None:
    trained, steps, samples = case
    model = model_reader.read(trained.graph)
    context = Context(
        teacher=model,
        samples=Samples(trained.train),
        plan=Plan(default=Precision.W2A2, range_method=RangeMethod.MSE),
        workdir=tmp_path,
        labels=trained.train_label,
        seed=1,
    )
    tuned = FineTune(FineTuneOptions(steps=steps, batch=64)).apply(model, context)
    model_writer.save(tuned, tmp_path / "tuned.onnx")
    lowered = trained.lowered(tmp_path / "tuned.onnx", Precision.W2A2, tmp_path / "lowered")
    assert lowered.precision == "w2a2"
    assert trained.drop(lowered) <= W2A2_DROP
    assert_exact(lowered, np.concatenate([trained.held_out, trained.train])[:samples], tmp_path)

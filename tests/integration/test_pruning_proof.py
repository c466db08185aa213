"""Half of a network's channels go, and self-distillation without labels brings back what it knew.

How much faster it is, is shown by ``make bench ARGS=pruning``.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.support import pruned_digits
from tests.support.pruned_digits import Pruned, drop
from tests.support.small_networks import Trained

from kedge.pruning.importance import Importance

MAX_DROP = 0.01


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return pruned_digits.network(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def chosen(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    return pruned_digits.pruned(trained, Importance.TAYLOR, tmp_path_factory.mktemp("taylor") / "work")


def kernels(path: Path) -> list[tuple[int, ...]]:
    model = onnx.load(str(path))
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    return [tuple(weights[node.input[1]].dims) for node in model.graph.node if node.op_type == "Conv"]


def test_the_whole_network_knows_its_digits(trained: Trained) -> None:
    assert trained.top1 > 0.97


def test_what_is_pruned_is_gone_from_the_graph_and_not_set_to_zero(trained: Trained, chosen: Pruned) -> None:
    assert kernels(trained.graph) == [(32, 1, 3, 3), (64, 32, 3, 3), (64, 64, 3, 3)]
    left = kernels(chosen.repaired)
    assert left == kernels(chosen.cut)
    assert sum(outputs for outputs, *_ in left) == 80
    # A third of the products is left; what is left is not zero.
    assert sum(np.prod(shape) for shape in left) < 0.4 * sum(np.prod(shape) for shape in kernels(trained.graph))
    for tensor in onnx.load(str(chosen.repaired)).graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim == 4:
            assert np.count_nonzero(value) > 0.99 * value.size
    assert chosen.repaired.stat().st_size < 0.6 * trained.graph.stat().st_size


def test_without_labels_it_learns_back_what_it_lost(trained: Trained, chosen: Pruned) -> None:
    assert drop(trained, chosen.cut) > 0.05
    assert drop(trained, chosen.repaired) <= MAX_DROP


def test_channels_taken_at_random_cost_more_before_the_repair(trained: Trained, tmp_path: Path) -> None:
    # A quarter: without half of its channels the network guesses, whichever they were.
    chosen, control = (
        pruned_digits.cut_only(trained, importance, tmp_path / importance.value, 0.25)
        for importance in (Importance.TAYLOR, Importance.RANDOM)
    )
    assert drop(trained, control) > drop(trained, chosen) + 0.05

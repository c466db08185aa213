"""Pruning of random convolutional networks: what is cut is what the network would answer if nobody read it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.pruning import BLOCKS, ENDS, answers, drawn, masked

from kedge.pruning import model_cost, surgery
from kedge.pruning.groups import structure


@settings(max_examples=40)
@given(
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=5),
    end=st.sampled_from(sorted(ENDS)),
    seed=st.integers(0, 1000),
    ratio=st.floats(0.1, 0.9),
    batch=st.sampled_from(["N", 1]),
)
def test_a_pruned_network_answers_as_the_masked_one(
    blocks: list[str], end: str, seed: int, ratio: float, batch: int | str
) -> None:
    model = drawn(blocks, end, seed, batch)
    before = model.SerializeToString(deterministic=True)
    found = structure(model)
    rng = np.random.default_rng(seed)
    removed = {
        group: sorted(rng.permutation(group.size)[: min(group.size - 1, max(1, int(group.size * ratio)))])
        for group in found.groups
    }
    pruned = surgery.cut(found, removed.items())
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(pruned, full_check=True)
    assert {node.name for node in pruned.graph.node} <= {node.name for node in model.graph.node}
    if found.groups:
        assert model_cost.parameters(pruned) < model_cost.parameters(model)
    feeds = {"image": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)}
    np.testing.assert_allclose(
        answers(pruned, feeds), answers(masked(found, removed), feeds), rtol=1e-3, atol=1e-4 + 1e-5 * 2 ** len(blocks)
    )


@pytest.mark.parametrize("block", sorted(set(BLOCKS) - {"padded"}))
def test_every_block_can_be_pruned(block: str) -> None:
    # Blocks of one kind only: their channels must be found, not just left alone.
    found = structure(drawn(["plain", block, "plain"], "averaged", 0))
    makers = {name for group in found.groups for name in group.nodes}
    convolutions = [node.name for node in found.model.graph.node if node.op_type == "Conv"]
    assert makers >= set(convolutions)


@pytest.mark.parametrize("end", sorted(ENDS))
def test_every_end_can_be_pruned(end: str) -> None:
    found = structure(drawn(["plain"], end, 0))
    assert any("Conv_0" in group.nodes for group in found.groups)

"""Attention heads and feed-forward width: found in graphs of several exporters, and cut as if they were masked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support.pruning import answers, context, masked

from kedge.pruning import model_cost, surgery
from kedge.pruning.groups import Kind, Structure, structure
from kedge.pruning.importance import Importance
from kedge.steps.prune_heads import PruneHeads, PruneHeadsOptions
from kedge.steps.prune_width import PruneWidth, PruneWidthOptions
from kedge_protocol.errors import ConfigError, StepError
from kedge_targets.graph import batch, model_reader

WIDTH, HEADS, INNER, WORDS = 32, 4, 48, 50


class Sentences:
    """Samples with a mask."""

    samples = 12

    def batches(self, size: int) -> Any:
        for start in range(0, self.samples, size):
            yield feed(min(size, self.samples - start), 9, seed=start)


def feed(count: int, length: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    mask = np.ones((count, length), np.int64)
    mask[:, length - 2 :] = rng.integers(0, 2, (count, 2))
    return {"ids": rng.integers(0, WORDS, (count, length)), "mask": mask}


def encoder(kind: str) -> Any:
    """``packed``: torch's own layer, one product makes queries, keys and values. ``separate``: three, as in BERT."""
    import torch
    from torch import nn

    class Separate(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.dense = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
            self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.wide, self.narrow = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

        def forward(self, hidden: Any, src_key_padding_mask: Any) -> Any:
            def split(made: Any) -> Any:
                shape = (made.shape[0], made.shape[1], HEADS, WIDTH // HEADS)
                return made.view(shape).transpose(1, 2)

            scores = split(self.query(hidden)) @ split(self.key(hidden)).transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
            scores = scores.masked_fill(src_key_padding_mask[:, None, None, :], -10000.0)
            mixed = (scores.softmax(-1) @ split(self.value(hidden))).transpose(1, 2).reshape(hidden.shape)
            hidden = self.before(hidden + self.dense(mixed))
            return self.after(hidden + self.narrow(nn.functional.gelu(self.wide(hidden))))

    class Encoder(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(WORDS, WIDTH)
            if kind == "packed":
                layers = [
                    nn.TransformerEncoderLayer(WIDTH, HEADS, INNER, batch_first=True, activation="gelu")
                    for _ in range(2)
                ]
            else:
                layers = [Separate(), Separate()]
            self.layers = nn.ModuleList(layers)
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden = self.embed(ids)
            for layer in self.layers:
                hidden = layer(hidden, src_key_padding_mask=mask == 0)
            shown = mask.unsqueeze(-1).float()
            return self.head((hidden * shown).sum(1) / shown.sum(1))

    torch.manual_seed(0)
    return Encoder().eval()


@pytest.fixture(scope="module", params=["packed", "packed-legacy", "separate", "separate-legacy"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return export(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return export("separate-legacy", tmp_path_factory.mktemp("plain"))


def export(how: str, folder: Path) -> onnx.ModelProto:
    import torch

    kind, _, legacy = how.partition("-")
    path = folder / "encoder.onnx"
    example = (torch.randint(0, WORDS, (2, 9)), torch.ones(2, 9, dtype=torch.int64))
    names: dict[str, Any] = {"input_names": ["ids", "mask"], "output_names": ["meaning"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if legacy:
            free = {name: {0: "batch", 1: "length"} for name in ("ids", "mask")}
            torch.onnx.export(
                encoder(kind), example, str(path), dynamo=False, dynamic_axes=free, opset_version=17, **names
            )
        else:
            dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
            free = {"ids": dims, "mask": dims}
            torch.onnx.export(encoder(kind), example, str(path), dynamo=True, dynamic_shapes=free, **names)
    return model_reader.read(path)


def shapes_of(made: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in made.items()}


def found_in(model: onnx.ModelProto) -> Structure:
    return structure(model, shapes_of(feed(1, 9)))


def test_heads_and_width_are_found(exported: onnx.ModelProto) -> None:
    found = found_in(exported)
    assert [(group.kind, group.size) for group in found.groups] == [(Kind.HEADS, HEADS), (Kind.WIDTH, INNER)] * 2


def test_removed_heads_are_masked_heads(exported: onnx.ModelProto) -> None:
    found = found_in(exported)
    first, second = found.of_kinds(Kind.HEADS)
    removed = {first: [0, 2], second: [3]}
    pruned = surgery.cut(found, removed.items())
    onnx.checker.check_model(pruned, full_check=True)
    given = feed(3, 9)
    np.testing.assert_allclose(answers(pruned, given), answers(masked(found, removed), given), atol=2e-5)
    assert np.abs(answers(pruned, given) - answers(exported, given)).max() > 1e-3
    size = WIDTH // HEADS
    gone = model_cost.parameters(found.model) - model_cost.parameters(pruned)
    assert gone == 3 * (4 * WIDTH * size + 3 * size)


def test_removed_width_is_masked_width(exported: onnx.ModelProto) -> None:
    found = found_in(exported)
    removed = {group: list(range(5, INNER, 2)) for group in found.of_kinds(Kind.WIDTH)}
    pruned = surgery.cut(found, removed.items())
    given = feed(2, 9)
    np.testing.assert_allclose(answers(pruned, given), answers(masked(found, removed), given), atol=2e-5)


def test_free_axes_stay_free(exported: onnx.ModelProto, request: pytest.FixtureRequest) -> None:
    found = found_in(exported)
    removed = {group: [1] for group in found.groups}
    pruned = surgery.cut(found, removed.items())
    assert batch.size(pruned) is None
    baked = "packed-legacy" in request.node.callspec.id  # this exporter writes the length of its example into the graph
    for count, length in ((1, 9), (5, 9), *(() if baked else ((4, 13),))):
        given = feed(count, length)
        np.testing.assert_allclose(answers(pruned, given), answers(masked(found, removed), given), atol=2e-5)


@pytest.mark.parametrize("importance", list(Importance))
def test_the_step_cuts_the_share(plain: onnx.ModelProto, tmp_path: Path, importance: Importance) -> None:
    told = context(plain, Sentences(), tmp_path)
    pruned = PruneHeads(PruneHeadsOptions(ratio=0.25, importance=importance)).apply(plain, told)
    assert told.figures["removed_heads"] == 2
    assert told.figures["parameters_after"] < told.figures["parameters_before"]
    assert told.figures["macs_after"] < told.figures["macs_before"]
    narrow = PruneWidth(PruneWidthOptions(ratio=0.5, importance=importance, multiple_of=8)).apply(pruned, told)
    assert told.figures["removed_width"] == INNER
    assert answers(narrow, feed(2, 9)).shape == (2, 5)
    assert any("heads" in note for note in told.notes)
    assert any("width" in note for note in told.notes)


@pytest.mark.parametrize("importance", [Importance.MAGNITUDE, Importance.TAYLOR, Importance.MEASURED])
def test_a_head_that_does_nothing_goes_first(plain: onnx.ModelProto, tmp_path: Path, importance: Importance) -> None:
    group = found_in(plain).of_kinds(Kind.HEADS)[1]
    silent = masked(found_in(plain), {group: [2]})
    told = context(silent, Sentences(), tmp_path)
    pruned = PruneHeads(PruneHeadsOptions(ratio=0.125, importance=importance)).apply(silent, told)
    assert told.figures["removed_heads"] == 1
    np.testing.assert_allclose(answers(pruned, feed(2, 9)), answers(silent, feed(2, 9)), atol=2e-5)


def test_layers_may_be_told_by_name(plain: onnx.ModelProto, tmp_path: Path) -> None:
    first, second = found_in(plain).of_kinds(Kind.HEADS)
    told = context(plain, Sentences(), tmp_path)
    options = PruneHeadsOptions(
        ratio=0.0, layers={second.name: 0.5}, leave=(first.name,), importance=Importance.MAGNITUDE
    )
    PruneHeads(options).apply(plain, told)
    assert f"{second.name} {HEADS} → {HEADS // 2}" in told.notes[-1]
    with pytest.raises(ConfigError, match="makes no channels"):
        PruneHeads(PruneHeadsOptions(layers={"nobody": 0.5})).apply(plain, told)


def test_a_graph_without_heads_says_so(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((4, 2), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="only")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    samples = type("One", (), {"samples": 1, "batches": lambda self, size: iter([{"x": np.ones((1, 4), np.float32)}])})
    for step in (PruneHeads(PruneHeadsOptions()), PruneWidth(PruneWidthOptions())):
        with pytest.raises(StepError, match="finds no"):
            step.apply(model, context(model, samples(), tmp_path))

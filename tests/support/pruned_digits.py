"""A convolutional network on scikit-learn's digits that loses half of its channels and is repaired without labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from kedge.demo import digits
from kedge.pruning.importance import Importance
from kedge.steps.distil import Distil, DistilOptions
from kedge.steps.prune_channels import PruneChannels, PruneChannelsOptions
from kedge_targets.graph import model_reader
from tests.support.lowering import float_answers, top1
from tests.support.pruning import context
from tests.support.small_networks import Samples, Trained, block, fitted

RATIO = 0.5
STEPS = 400


@dataclass(frozen=True)
class Pruned:
    """Files of the graph before and after the repair."""

    cut: Path
    repaired: Path


def network(folder: Path) -> Trained:
    """Three convolutions of 32, 64 and 64 channels; 1200 samples to train, 597 held out."""
    torch.manual_seed(0)
    data = digits.load()
    split = (
        (data.train / 16).astype(np.float32),
        data.train_label,
        (data.held_out / 16).astype(np.float32),
        data.held_out_label,
    )
    layers = [*block(1, 32), *block(32, 64), nn.MaxPool2d(2), *block(64, 64), nn.Flatten(), nn.Linear(64 * 16, 10)]
    return fitted(layers, split, folder, epochs=8)


def cut_only(trained: Trained, importance: Importance, folder: Path, ratio: float) -> Path:
    """A share of the channels away, and nothing else."""
    folder.mkdir()
    whole, samples = model_reader.load(trained.graph), Samples(trained.train)
    options = PruneChannelsOptions(ratio=ratio, importance=importance)
    onnx.save_model(PruneChannels(options).apply(whole, context(whole, samples, folder)), str(folder / "cut.onnx"))
    return folder / "cut.onnx"


def pruned(trained: Trained, importance: Importance, folder: Path) -> Pruned:
    """Half of the channels away; then self-distillation on the pictures alone."""
    cut = onnx.load(str(cut_only(trained, importance, folder, RATIO)))
    whole, samples = model_reader.load(trained.graph), Samples(trained.train)
    repaired = Distil(DistilOptions(steps=STEPS)).apply(cut, context(whole, samples, folder))
    found = Pruned(folder / "cut.onnx", folder / "repaired.onnx")
    onnx.save_model(repaired, str(found.repaired))
    return found


def drop(trained: Trained, graph: Path) -> float:
    """Of top-1 on what was held out."""
    return trained.top1 - top1(float_answers(graph, trained.held_out), trained.held_out_label)

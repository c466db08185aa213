"""The demo's model: a convolutional network for scikit-learn's handwritten digits, trained here in seconds."""

from __future__ import annotations

import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import MissingDependencyError
from kedge_protocol.packages import pip_install

Array = npt.NDArray[Any]

SEED = 7


@dataclass(frozen=True)
class Digits:
    """The data set: 1797 images of 8x8, values 0..16, as float32 (samples, 1, 8, 8), split once with a fixed seed."""

    train: Array
    train_label: Array
    calibration: Array
    held_out: Array
    held_out_label: Array


def load() -> Digits:
    """Return the digits, shuffled with a fixed seed: 1000 to train, 200 to calibrate, the rest held out.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the demo needs scikit-learn", remedy=pip_install("host,dev")) from error
    data = load_digits()
    order = np.random.default_rng(SEED).permutation(len(data.target))
    images = data.images.astype(np.float32)[:, None][order]
    labels = data.target.astype(np.int64)[order]
    return Digits(images[:1000], labels[:1000], images[1000:1200], images[1200:], labels[1200:])


class Classifier:
    """A network of about 4 MB: three convolutions, then a wide hidden layer and the class scores."""

    def __init__(self) -> None:
        import torch
        from torch import nn

        torch.manual_seed(SEED)
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 1024),
            nn.ReLU(),
            nn.Linear(1024, 10),
        )

    def fit(self, images: Array, labels: Array, *, epochs: int, last_layer_only: bool = False) -> None:
        """Train with Adam and cross entropy.

        Args:
            images: float32 (samples, 1, 8, 8), values 0..1.
            labels: int64 (samples,).
            last_layer_only: fine-tune only the class scores, so that all other weights stay bit-identical.
        """
        import torch
        from torch.nn import functional

        for parameter in self.net.parameters():
            parameter.requires_grad_(not last_layer_only)
        for parameter in self.net[-1].parameters():
            parameter.requires_grad_(True)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=1e-3)
        generator = torch.Generator().manual_seed(SEED)
        x, y = torch.from_numpy(images), torch.from_numpy(labels)
        self.net.train()
        for _ in range(epochs):
            for batch in torch.randperm(len(x), generator=generator).split(64):
                optimizer.zero_grad()
                functional.cross_entropy(self.net(x[batch]), y[batch]).backward()
                optimizer.step()

    def export(self, path: Path) -> None:
        """Write the network as ONNX with a free batch axis; input ``image``, output ``scores``."""
        import torch

        self.net.eval()
        buffer = io.BytesIO()
        # The exporter tells of packages that it would use were they there.
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                self.net,
                (torch.zeros(2, 1, 8, 8),),
                dynamo=True,
                external_data=False,
                input_names=["image"],
                output_names=["scores"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        program.save(buffer)
        path.write_bytes(buffer.getvalue())

"""The three models of ``make demo ARGS=ocr``, trained on drawn text in about a minute and a half: one finds lines, one
says whether a line is upside down, one reads it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.demo import lettering
from kedge_targets.pipeline.resampling import resize

Array = npt.NDArray[Any]

SEED = 11
PAGE = (384, 320)
"""Width and height of the finder's input."""
LINE = (320, lettering.LINE_HEIGHT)
_DIRECTION = (128, lettering.LINE_HEIGHT)
_STEP = 2
"""Pixels of one step of the reader."""
_CORE = 0.25
"""The share of a line's height by which the finder's map is smaller on each side."""
GROW = 1.0
"""What :attr:`kedge_protocol.bundle.pipeline.Regions.grow` must be to undo that."""


def finder(steps: int = 160) -> Any:
    """Train the finder: ``image`` N x 3 x 320 x 384 in -1..1 to ``map`` N x 1 x 320 x 384."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    net = nn.Sequential(
        *_conv(3, 8, stride=2), *_conv(8, 16, stride=2), *_conv(16, 24), *_conv(24, 24, dilation=3),
        *_conv(24, 24, dilation=6), nn.Conv2d(24, 4, 1), nn.PixelShuffle(2), nn.Upsample(scale_factor=2.0),
    )  # fmt: skip

    def batch() -> tuple[Any, Any]:
        pages, maps = [], []
        for _ in range(4):
            texts = [lettering.words(rng, int(rng.integers(3, 16))) for _ in range(6)]
            pixels, boxes = lettering.page(texts, rng, size=PAGE, angle=float(rng.choice([0, rng.uniform(-8, 8)])))
            pages.append(_normalized(pixels))
            maps.append(_cores(boxes))
        return torch.from_numpy(np.stack(pages)), torch.from_numpy(np.stack(maps))

    def loss(answer: Any, wanted: Any) -> Any:
        return functional.binary_cross_entropy_with_logits(answer[:, 0], wanted, pos_weight=torch.tensor(1.5))

    _fit(net, batch, loss, steps, rate=4e-3)
    return nn.Sequential(net, nn.Sigmoid())


def direction(steps: int = 300) -> Any:
    """Train the classifier: ``image`` N x 3 x 32 x 128 in -1..1 to ``scores`` N x 2, upright and upside down."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 1)
    net = nn.Sequential(
        *_conv(3, 16, stride=2), *_conv(16, 32, stride=2), *_conv(32, 48, stride=2),
        nn.Conv2d(48, 64, (4, 3), padding=(0, 1)), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2),
    )  # fmt: skip

    def batch() -> tuple[Any, Any]:
        turned = rng.integers(0, 2, 32)
        lines = []
        for turn in turned:
            pixels = lettering.line(lettering.words(rng, int(rng.integers(3, 16))), rng).pixels
            lines.append(_fitted(np.rot90(pixels, 2) if turn else pixels, _DIRECTION)[0])
        return torch.from_numpy(np.stack(lines)), torch.from_numpy(turned)

    _fit(net, batch, functional.cross_entropy, steps, rate=4e-3)
    return nn.Sequential(net, nn.Softmax(1))


def reader(steps: int = 360) -> Any:
    """Train the reader: ``image`` N x 3 x 32 x 320 in -1..1 to ``steps`` N x 160 x 41: for each step the probabilities
    of the blank, of the alphabet and of the space."""
    import torch
    from torch import nn
    from torch.nn import functional

    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED + 2)
    classes = len(lettering.ALPHABET) + 2
    net = nn.Sequential(
        *_conv(3, 16, stride=(2, 1)), *_conv(16, 32, stride=(2, 2)), *_conv(32, 48, stride=(2, 1)),
        *_conv(48, 64, stride=(2, 1)), nn.Conv2d(64, 96, (2, 5), padding=(0, 2)), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Conv2d(96, classes, 1), nn.Flatten(2),
    )  # fmt: skip

    def batch() -> tuple[Any, Any]:
        lines, wanted = [], np.zeros((24, LINE[0] // _STEP), np.int64)
        for row in range(24):
            drawn = lettering.line(lettering.words(rng, int(rng.integers(2, 19))), rng)
            made, width = _fitted(drawn.pixels, LINE)
            lines.append(made)
            for letter, middle in zip(drawn.text, drawn.middles, strict=True):
                step = min(int(middle * width / _STEP), wanted.shape[1] - 1)
                wanted[row, step] = classes - 1 if letter == " " else lettering.ALPHABET.index(letter) + 1
        return torch.from_numpy(np.stack(lines)), torch.from_numpy(wanted)

    weights = torch.full((classes,), 4.0)
    weights[0] = 1.0

    def loss(answer: Any, wanted: Any) -> Any:
        return functional.cross_entropy(answer, wanted, weight=weights)

    _fit(net, batch, loss, steps, rate=4e-3)

    class Steps(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, image: Any) -> Any:
            return self.net(image).transpose(1, 2).softmax(2)

    return Steps()


def export(model: Any, path: Path, size: tuple[int, int], output: str) -> None:
    """Write a model as ONNX with a free batch axis.

    Args:
        size: width and height of its input.
    """
    import torch

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, size[1], size[0]),),
            str(path),
            dynamo=True,
            external_data=False,
            input_names=["image"],
            output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


def _conv(given: int, made: int, *, stride: int | tuple[int, int] = 1, dilation: int = 1) -> tuple[Any, ...]:
    from torch import nn

    layer = nn.Conv2d(given, made, 3, stride, dilation, dilation, bias=False)
    return layer, nn.BatchNorm2d(made), nn.ReLU()


def _fit(
    net: Any, batch: Callable[[], tuple[Any, Any]], loss: Callable[[Any, Any], Any], steps: int, rate: float
) -> None:
    import torch

    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    net.train()
    for _ in range(steps):
        given, wanted = batch()
        optimizer.zero_grad()
        loss(net(given), wanted).backward()
        optimizer.step()
        schedule.step()
    net.eval()


def _normalized(pixels: Array) -> Array:
    """Return RGB pixels as the models take them: 3 x height x width (blue, green, red) in -1..1."""
    return np.ascontiguousarray(pixels[..., ::-1].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)


def _fitted(pixels: Array, size: tuple[int, int]) -> tuple[Array, int]:
    """Return a line as the pipeline fits it, and its width there."""
    height, width = pixels.shape[:2]
    scaled = min(size[0], -(-width * size[1] // height))
    ground = np.full((size[1], size[0], 3), 127, np.uint8)
    ground[:, :scaled] = resize(np.ascontiguousarray(pixels), (scaled, size[1]), antialias=False)
    return _normalized(ground), scaled


def _cores(boxes: list[Array]) -> Array:
    """Return the map that the finder is to give: 1 in the core of each line."""
    from PIL import Image, ImageDraw

    picture = Image.new("L", PAGE, 0)
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        draw.polygon([tuple(corner) for corner in lettering.core(box, _CORE).tolist()], fill=1)
    return np.asarray(picture, np.float32)

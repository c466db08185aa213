"""Pictures for detectors: crops and shifts of the photos that scikit-image's wheel and scikit-learn ship."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tests.support import foreign

Array = npt.NDArray[Any]

_SKIMAGE = (
    "astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "color.png", "motorcycle_left.png",
    "motorcycle_right.png", "rocket.jpg", "retina.jpg", "hubble_deep_field.jpg", "ihc.png", "page.png", "text.png",
    "brick.png", "grass.png", "gravel.png", "horse.png", "logo.png", "moon.png", "clock_motion.png", "cell.png",
)  # fmt: skip
_SKLEARN = ("china.jpg", "flower.jpg")
_SMALLEST = 48


@lru_cache
def photos() -> dict[str, Image.Image]:
    """File name → picture, all of them RGB."""
    import sklearn.datasets

    shipped = foreign.package("scikit-image") / "skimage" / "data"
    made = {name: Image.open(shipped / name).convert("RGB") for name in _SKIMAGE}
    beside = Path(sklearn.datasets.__file__).parent / "images"
    return made | {name: Image.open(beside / name).convert("RGB") for name in _SKLEARN}


def crop(photo: Image.Image, rng: np.random.Generator, size: int, *, least: float = 0.35) -> Array:
    """A square of it, at least ``least`` of its shorter side wide, perhaps mirrored, lighter or darker.

    Returns:
        uint8, size x size x 3.
    """
    shorter = min(photo.size)
    side = max(_SMALLEST, int(shorter * rng.uniform(least, 1.0)))
    left, top = (int(rng.integers(0, length - side + 1)) for length in photo.size)
    part = photo.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.asarray(part, np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.rint(np.clip(pixels * rng.uniform(0.7, 1.3), 0, 255)).astype(np.uint8)


def crops(count: int, size: int, *, seed: int, names: tuple[str, ...] | None = None) -> Array:
    """Crops of all photos in turn, or of those named: float32 count x 3 x size x size in 0..1, as cameras give them
    (multiples of 1/255)."""
    made = np.empty((count, 3, size, size), np.float32)
    for index, pixels in zip(range(count), _endless(size, seed, names), strict=False):
        made[index] = pixels.transpose(2, 0, 1).astype(np.float32) / 255
    return made


def _endless(size: int, seed: int, names: tuple[str, ...] | None) -> Iterator[Array]:
    rng = np.random.default_rng(seed)
    chosen = [photos()[name] for name in names or tuple(photos())]
    while True:
        for photo in chosen:
            yield crop(photo, rng, size)

"""Pages of text: documents and signs in four fonts of matplotlib, upright, tilted, upside down and sideways."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "DejaVuSansMono.ttf", "DejaVuSans-Bold.ttf")
_SIZES = ((900, 700), (800, 1000), (640, 480), (1200, 760))
_ANGLES = (0, 0, 7, -10, 180, 0, 3, 90)
_TEXTS = (
    "Invoice No. 2026-11", "TOTAL 19.90 EUR", "Main Street 14", "Gate B7 closes 14:32", "Platform 9", "Room 101",
    "Danger: High Voltage", "open daily 8-18", "Fresh water only", "SALE 50% off", "Keep door closed", "Emergency Exit",
    "Please mind the step", "edge deployment", "Serial A4-7731-X", "Net weight 250 g",
)  # fmt: skip


def page(number: int, rng: np.random.Generator) -> Image.Image:
    """One page; its size, font and angle follow from its number."""
    width, height = _SIZES[number % len(_SIZES)]
    ground = rng.integers(150, 256, 3) + rng.normal(0, 4, (height, width, 3)) + np.linspace(-25, 25, width)[:, None]
    made = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    layer = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(layer)
    size = int(rng.integers(24, 44))
    font = _font(_FONTS[number % len(_FONTS)], size)
    y = int(rng.integers(30, 60))
    while y < height - 80:
        x = int(rng.integers(30, 80))
        text = str(rng.choice(_TEXTS))
        draw.text((x, y), text, fill=255, font=font)
        length = draw.textlength(text, font=font)
        if x + 2 * length + 90 < width and rng.random() < 0.6:
            draw.text((x + length + 90, y), str(rng.choice(_TEXTS)), fill=255, font=font)
        y += int(size * rng.uniform(1.7, 2.6))
    layer = layer.rotate(_ANGLES[number % len(_ANGLES)], resample=Image.Resampling.BICUBIC)
    ink = tuple(int(value) for value in rng.integers(0, 80, 3))
    made.paste(ink, (0, 0), layer)
    return made


def save(folder: Path, count: int) -> Path:
    """Write ``count`` pages as PNG; ``folder``."""
    folder.mkdir()
    rng = np.random.default_rng(5)
    for number in range(count):
        page(number, rng).save(folder / f"{number:02d}.png")
    return folder


def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)

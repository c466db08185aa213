"""Decodes and orients pictures, scales them to a model's size and maps boxes back to the picture.

JPEG, PNG, BMP and WebP are decoded by Pillow (the agent's extra ``pictures``); arrays need only numpy.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.pipeline import Colour, Fit, Picture
from kedge_protocol.errors import InputError, MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install
from kedge_targets.pipeline.resampling import Pixels as Pixels
from kedge_targets.pipeline.resampling import resize, sampled

Array = npt.NDArray[Any]

MAX_PIXELS = 64_000_000
"""A picture with more pixels is rejected by its header, before it is decoded."""
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
"""Pillow's names; a camera's MPO is opened as the JPEG that it begins with."""
_GREY = np.asarray([19595, 38470, 7471], dtype=np.uint32)
"""ITU-R 601 weights in 16 fractional bits, as in Pillow's conversion to grey."""


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in a model's input: ``input = picture * scale + offset``, in pixels.

    Attributes:
        size: the width and height of the picture after orientation.
        input_size: the width and height of the model's input.
    """

    size: tuple[int, int]
    input_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[float, float]

    def to_picture(self, boxes: Array) -> Array:
        """Convert boxes ``[D, 4]`` from fractions of the input (x1, y1, x2, y2) to pixels of the picture, clipped at
        its edges."""
        corners = boxes.astype(np.float64) * np.tile(self.input_size, 2)
        moved = (corners - np.tile(self.offset, 2)) / np.tile(self.scale, 2)
        return np.asarray(np.clip(moved, 0, np.tile(self.size, 2)))

    def to_input(self, boxes: Array) -> Array:
        """Convert boxes ``[D, 4]`` from fractions of the picture to fractions of the input, clipped at its edges."""
        corners = boxes.astype(np.float64) * np.tile(self.size, 2)
        moved = corners * np.tile(self.scale, 2) + np.tile(self.offset, 2)
        return np.asarray(np.clip(moved / np.tile(self.input_size, 2), 0, 1))


def is_picture(item: Any) -> bool:
    """Return whether an item is a Pillow picture, without importing Pillow."""
    return type(item).__module__.startswith("PIL.") and hasattr(item, "convert")


def load(item: Any, *, where: str = "", max_pixels: int = MAX_PIXELS) -> Pixels:
    """Return a picture's pixels: uint8, height x width x 3 (RGB) or x 1 (grey), rotated according to its EXIF
    orientation.

    Args:
        item: a path, the bytes of a file, a Pillow picture, or an array height x width (x 1, 3 or 4) of uint8.
        where: the item's name in messages.
        max_pixels: see :data:`MAX_PIXELS`.

    Raises:
        InputError: the item is not a picture, is damaged, or is larger than ``max_pixels``.
        MissingDependencyError: Pillow is needed but not installed.
    """
    if isinstance(item, (str, os.PathLike)):
        return decode(_read(Path(item)), where=where or str(item), max_pixels=max_pixels)
    if isinstance(item, (bytes, bytearray, memoryview)):
        return decode(bytes(item), where=where, max_pixels=max_pixels)
    if is_picture(item):
        return _pixels(item, where)
    return _from_array(np.asarray(item), where)


def decode(content: bytes, *, where: str = "", max_pixels: int = MAX_PIXELS) -> Pixels:
    """Decode a file's bytes to pixels; see :func:`load`."""
    image = _pillow()
    try:
        with image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise InputError(
                    f"a picture of {width}x{height} pixels is over the limit of {max_pixels}",
                    where=where or None,
                    remedy="Make it smaller",
                )
            return _pixels(picture, where)
    except InputError:
        raise
    except image.DecompressionBombError as error:
        raise InputError(
            f"a picture is over the limit of {max_pixels} pixels: {error}",
            where=where or None,
            remedy="Make it smaller",
        ) from error
    except image.UnidentifiedImageError as error:
        raise InputError("is no picture: neither JPEG, PNG, BMP nor WebP", where=where or None) from error
    except Exception as error:
        # Pillow's plug-ins raise whatever a damaged file makes them raise.
        raise InputError(
            f"is no picture that can be read: {error}", where=where or None, remedy="Give a JPEG or PNG file"
        ) from error


def place(pixels: Pixels, how: Picture) -> tuple[Pixels, Placement]:
    """Convert a picture to the model's size, colour and layout.

    Args:
        pixels: see :func:`load`.
        how: the picture section, with ``width``, ``height`` and ``layout``.

    Returns:
        uint8 in the layout without its batch (``NCHW`` gives C x H x W), and the picture's place in it.
    """
    coloured = colour(pixels, how.colour or Colour.RGB)
    size = (coloured.shape[1], coloured.shape[0])
    wanted = (how.width, how.height)
    if how.fit is Fit.FREE:
        wanted = _free_size(size, how)
    elif how.fit is Fit.LINE and how.widest:
        wanted = (max(how.width, min(how.widest, int(how.height * size[0] / size[1]))), how.height)
    scaled, left, top = _scaled_size(size, wanted, how)
    made = resize(coloured, scaled, by=how.filter, antialias=how.antialias)
    if scaled != wanted:
        made = _on_ground(made, wanted, left, top, how.fill)
    scale = (scaled[0] / size[0], scaled[1] / size[1])
    if how.layout.endswith("CHW"):
        made = np.ascontiguousarray(made.transpose(2, 0, 1))
    return made, Placement(size, wanted, scale, (float(left), float(top)))


def colour(pixels: Pixels, wanted: Colour) -> Pixels:
    """Convert RGB or grey pixels to the model's order of channels."""
    if wanted is Colour.GREY:
        if pixels.shape[2] == 1:
            return pixels
        grey = (pixels.astype(np.uint32) @ _GREY + 0x8000) >> 16
        return grey.astype(np.uint8)[..., None]
    full = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels
    return np.ascontiguousarray(full[..., ::-1]) if wanted is Colour.BGR else full


def crop(pixels: Pixels, box: Array, *, margin: float = 0.0) -> Pixels:
    """Return the contents of a box (x1, y1, x2, y2 in pixels) with ``margin`` of its size added on each side; at least
    one pixel."""
    height, width = pixels.shape[:2]
    x1, y1, x2, y2 = (float(value) for value in box)
    across, down = (x2 - x1) * margin, (y2 - y1) * margin
    left, top = max(0, min(width - 1, int(x1 - across))), max(0, min(height - 1, int(y1 - down)))
    right = max(left + 1, min(width, int(np.ceil(x2 + across))))
    bottom = max(top + 1, min(height, int(np.ceil(y2 + down))))
    return np.ascontiguousarray(pixels[top:bottom, left:right])


def cut(pixels: Pixels, corners: Array) -> Pixels:
    """Return the contents of a rectangle seen in perspective, straightened (bicubic, a = -0.5, edges repeated), as wide
    and high as the longer of opposite sides.

    Args:
        corners: ``[4, 2]``, x and y in pixels, clockwise from the top left.
    """
    sides = np.linalg.norm(corners - np.roll(corners, -1, axis=0), axis=1)
    width, height = max(1, int(max(sides[0], sides[2]))), max(1, int(max(sides[1], sides[3])))
    left, top = (int(value) for value in corners[0])
    straight = np.asarray([[0, 0], [width, 0], [width, height], [0, height]], np.float64)
    inside = 0 <= left <= pixels.shape[1] - width and 0 <= top <= pixels.shape[0] - height
    if inside and np.array_equal(corners, straight + corners[0]) and np.array_equal(corners[0], (left, top)):
        return np.ascontiguousarray(pixels[top : top + height, left : left + width])
    across, down = np.meshgrid(np.arange(width, dtype=np.float64), np.arange(height, dtype=np.float64))
    a = _homography(straight, corners.astype(np.float64))
    depth = a[6] * across + a[7] * down + 1.0
    x, y = (a[0] * across + a[1] * down + a[2]) / depth, (a[3] * across + a[4] * down + a[5]) / depth
    return sampled(pixels, x, y)


def _homography(given: Array, wanted: Array) -> Array:
    """Return the eight numbers of the projective map that takes four points to four others."""
    rows = []
    for (x, y), (u, v) in zip(given, wanted, strict=True):
        rows.append([x, y, 1, 0, 0, 0, -u * x, -u * y])
        rows.append([0, 0, 0, x, y, 1, -v * x, -v * y])
    try:
        return np.asarray(np.linalg.solve(np.asarray(rows), wanted.reshape(-1)))
    except np.linalg.LinAlgError as error:
        raise InputError("the corners lie on one line", remedy="Give four corners of a rectangle") from error


def _free_size(size: tuple[int, int], how: Picture) -> tuple[int, int]:
    scale = min(max(1.0, how.shortest / min(size)), how.longest / max(size))
    width, height = (max(1, round(int(side * scale) / how.multiple)) * how.multiple for side in size)
    return width, height


def _scaled_size(size: tuple[int, int], wanted: tuple[int, int], how: Picture) -> tuple[tuple[int, int], int, int]:
    """Return the size of the scaled picture and the position of its left and top edges in the input (below 0 if it is
    cropped)."""
    width, height = size
    wide, high = wanted
    if how.fit in (Fit.STRETCH, Fit.FREE):
        return (wide, high), 0, 0
    if how.fit is Fit.LINE:
        # Rounded up, as PaddleOCR does it.
        return (max(1, min(wide, -(-width * high // height))), high), 0, 0
    if how.fit is Fit.LETTERBOX:
        scale = min(wide / width, high / height)
        scaled = (max(1, min(wide, round(width * scale))), max(1, min(high, round(height * scale))))
        # An odd pixel goes to the right and to the bottom, as Ultralytics' LetterBox has it.
        return scaled, round((wide - scaled[0]) / 2 - 0.1), round((high - scaled[1]) / 2 - 0.1)
    scale = max(wide / width, high / height) / how.crop_share
    scaled = (max(wide, int(width * scale + 1e-6)), max(high, int(height * scale + 1e-6)))
    return scaled, -round((scaled[0] - wide) / 2), -round((scaled[1] - high) / 2)


def _on_ground(made: Pixels, wanted: tuple[int, int], left: int, top: int, fill: int) -> Pixels:
    wide, high = wanted
    if left <= 0 and top <= 0 and made.shape[1] + left >= wide and made.shape[0] + top >= high:
        return np.ascontiguousarray(made[-top : high - top, -left : wide - left])
    ground = np.full((high, wide, made.shape[2]), fill, dtype=np.uint8)
    ground[top : top + made.shape[0], left : left + made.shape[1]] = made
    return ground


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


def _pixels(picture: Any, where: str) -> Pixels:
    from PIL import ImageOps

    turned = ImageOps.exif_transpose(picture)
    if turned.mode == "F":
        return _from_array(np.asarray(turned), where)  # floats of whatever range are refused there
    if turned.mode.startswith("I"):
        # PNG with 16 bits a channel.
        deep = np.asarray(turned)
        return np.asarray((np.clip(deep, 0, 65535).astype(np.uint16) >> 8), np.uint8)[..., None]
    grey = turned.mode in ("1", "L", "LA")
    return _from_array(np.asarray(turned.convert("L" if grey else "RGB")), where)


def _from_array(array: Array, where: str) -> Pixels:
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not fits or 0 in array.shape:
        have = f"{array.dtype} {'x'.join(map(str, array.shape))}" if array.ndim else f"of one {array.dtype}"
        raise InputError(
            f"an array {have} is no picture",
            where=where or None,
            remedy="Give uint8, height x width x 3 (RGB); for the model's own tensors call Model.raw",
        )
    shaped = array[..., None] if array.ndim == 2 else array
    return np.ascontiguousarray(shaped[..., :3] if shaped.shape[2] == 4 else shaped)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "decoding pictures needs Pillow",
            remedy=f"Install it: {pip_install('pictures', of=AGENT)}; or give pixels, uint8 height x width x 3",
        ) from error
    return Image

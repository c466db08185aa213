"""The ready pipeline for segmentation: a picture in, a class for each of its pixels out, in Python and over HTTP."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import TensorProto, helper
from PIL import Image
from tests.support import raw_data
from tests.support.standalone import serving

import kedge
from kedge_agent import Model
from kedge_targets.pipeline.answers import to_json

Array = npt.NDArray[Any]
SIDE = 32


def colour_of_each_pixel(path: Path) -> Path:
    """``pixels`` N x 3 x 32 x 32 to ``scores`` N x 3 x 16 x 16, half as fine: red, green and blue themselves."""
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["coarse"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Conv", ["coarse", "w"], ["scores"], kernel_shape=[1, 1]),
    ]
    inputs = {"pixels": (TensorProto.FLOAT, ["N", 3, SIDE, SIDE])}
    weights = {"w": np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1)}
    return raw_data.saved(path, nodes, inputs, {"scores": ["N", 3, SIDE // 2, SIDE // 2]}, weights)


def flag(width: int, height: int, order: tuple[int, ...]) -> tuple[Array, Array]:
    """A picture of upright stripes, and the class of each pixel."""
    stripes = np.repeat(order, width // len(order))
    classes = np.broadcast_to(np.pad(stripes, (0, width - len(stripes)), mode="edge"), (height, width))
    return np.eye(3, dtype=np.uint8)[classes] * 200, classes


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masks")
    pictures = folder / "pictures"
    pictures.mkdir()
    for number, order in enumerate([(0, 1, 2), (2, 1), (1, 0), (2, 0, 1)] * 3):
        Image.fromarray(flag(60 + 6 * number, 48, order)[0]).save(pictures / f"{number}.png")
    labels = folder / "labels.txt"
    labels.write_text("\n".join(raw_data.COLOURS))
    kedge.compile(
        colour_of_each_pixel(folder / "model.onnx"), name="masks", version="1", targets=["generic-cpu"],
        calibration=pictures, evaluation=pictures, labels=labels, task="segmentation", out=folder / "OUT",
        quantize="precision=float32", max_drop=1.0,
    )  # fmt: skip
    return folder / "OUT"


@pytest.mark.parametrize(("width", "height"), [(96, 48), (33, 80)])
def test_each_pixel_of_the_picture_has_its_class(release: Path, width: int, height: int) -> None:
    picture, expected = flag(width, height, (2, 0, 1))
    with Model(release, target="generic-cpu") as model:
        mask = model(picture)
    assert mask.classes.shape == (height, width)
    # By the borders of the stripes the coarse scores are mixed.
    assert (mask.classes == expected).mean() > 0.9


def test_the_same_mask_over_http(release: Path) -> None:
    picture, _ = flag(64, 40, (1, 2))
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    with serving(str(release), "--listen", "127.0.0.1:0") as server:
        server.wait()
        status, answer = server.send("/v2/models/masks/pipeline", file.getvalue(), "image/png")
    assert status == 200
    with Model(release, target="generic-cpu") as model:
        assert answer["answer"] == json.loads(json.dumps(to_json(model(picture))))

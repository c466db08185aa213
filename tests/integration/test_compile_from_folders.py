"""``kedge compile`` from folders as people have them: raw data in, a bundle out that takes raw data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from PIL import Image
from tests.support import detections, raw_data
from tests.support.compiling import kedge as command

import kedge
from kedge import Release
from kedge_agent import Model
from kedge_protocol.bundle.pipeline import Head
from kedge_protocol.errors import ConfigError, DatasetError
from kedge_targets.pipeline.answers import to_json

Array = npt.NDArray[Any]


def compiled(model: Path, data: Path, **options: Any) -> Release:
    return kedge.compile(
        model,
        name="raw",
        version="1",
        targets=["generic-cpu"],
        **{"calibration": data / "train", "evaluation": data / "val", "effort": "quick", "max_drop": 0.2, **options},
        out=model.with_name("OUT"),
    )


def test_pictures_in_class_folders_by_one_command(tmp_path: Path) -> None:
    model = raw_data.colour_model(tmp_path / "colours.onnx", {"names": str(dict(enumerate(raw_data.COLOURS)))})
    for seed, split in enumerate(("train", "val")):
        raw_data.class_folders(tmp_path / "data" / split, seed=seed)
    line = ["compile", str(model), "--name", "colours", "--version", "1", "--target", "generic-cpu"]
    line += ["--calibration", str(tmp_path / "data"), "--evaluation", str(tmp_path / "data")]
    line += ["--task", "classification", "--effort", "quick", "-o", str(tmp_path / "OUT")]
    done = command(line)
    assert done.returncode == 0, done.stderr
    release = Release.open(tmp_path / "OUT")
    report = release.report
    assert report is not None
    assert (report.metric, report.reference.value) == ("top1", 1.0)
    bundle = release.bundles["generic-cpu"]
    assert bundle.config.labels == raw_data.COLOURS
    assert "examples.json" in bundle.files
    model_ = Model(tmp_path / "OUT", target="generic-cpu")
    picture = tmp_path / "data" / "val" / "green" / "0.jpg"
    pixels = np.asarray(Image.open(picture))
    answers = [model_(str(picture)), model_(picture.read_bytes()), model_(Image.open(picture)), model_(pixels)]
    assert all(answer == answers[0] for answer in answers)
    assert answers[0][0].name == "green"
    assert answers[0][0].score > 0.9
    by_hand = model_.raw(np.zeros((1, 3, raw_data.SIZE, raw_data.SIZE), np.uint8))
    assert by_hand.shape == (1, 3)


def test_raw_data_without_a_pipeline_is_refused_with_what_to_give(tmp_path: Path) -> None:
    model = raw_data.colour_model(tmp_path / "colours.onnx")
    for split in ("train", "val"):
        raw_data.class_folders(tmp_path / split, 3)
    with pytest.raises(ConfigError, match=r"holds pictures in class folders, and nothing says.*--task"):
        compiled(model, tmp_path)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    model = raw_data.colour_model(tmp_path / "colours.onnx")
    for split in ("train", "val"):
        raw_data.class_folders(tmp_path / split, 3)
    (tmp_path / "val" / "red" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError, match=r"val.*red/1\.png: is no picture"):
        compiled(model, tmp_path, task="classification")


def yolo(folder: Path, *, count: int = 10) -> Path:
    """A data set as YOLO's tools write it; its data.yaml."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels, rows = raw_data.boxed(rng, (150, 100) if number % 2 else (128, 64))
            Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
            lines = [f"{int(k)} {(a + c) / 2} {(b + d) / 2} {c - a} {d - b}" for k, a, b, c, d in rows]
            (folder / "labels" / split / f"{number}.txt").write_text("\n".join(lines), encoding="utf-8")
    content = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: red\n  1: green\n  2: blue\n"
    (folder / "data.yaml").write_text(content, encoding="utf-8")
    return folder / "data.yaml"


def by_hand(model: Path, pixels: Array) -> detections.Found:
    """Letterbox, decoding and suppression that are not Kedge's; boxes in pixels of the picture."""
    height, width = pixels.shape[:2]
    scale = min(64 / width, 32 / height)
    inner = (round(width * scale), round(height * scale))
    # Halves of both sides where nothing is smoothed: every picture here shrinks.
    scaled = _plain_bilinear(pixels, *inner)
    ground = np.full((32, 64, 3), 114, np.uint8)
    left, top = (64 - inner[0]) // 2, (32 - inner[1]) // 2
    ground[top : top + inner[1], left : left + inner[0]] = scaled
    feed = ground.transpose(2, 0, 1)[None].astype(np.float32) / 255
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    found = detections.decoded(session.run(None, {"images": feed})[0][0], score=0.25, same=0.7)
    boxes = (found.boxes - [left, top, left, top]) / np.tile([inner[0] / width, inner[1] / height], 2)
    return detections.Found(np.clip(boxes, 0, [width, height, width, height]), found.scores, found.classes)


def _plain_bilinear(pixels: Array, width: int, height: int) -> Array:
    """Two neighbours in each direction, pixel centres at halves, no antialiasing."""
    made = pixels.astype(np.float64)
    for axis, wanted in ((1, width), (0, height)):
        at = np.clip((np.arange(wanted) + 0.5) * pixels.shape[axis] / wanted - 0.5, 0, pixels.shape[axis] - 1)
        low = np.floor(at).astype(int)
        share = (at - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        high = np.minimum(low + 1, pixels.shape[axis] - 1)
        made = made.take(low, axis) * (1 - share) + made.take(high, axis) * share
    return np.rint(made).astype(np.uint8)


def test_a_detector_with_yolo_labels_answers_boxes_that_an_independent_decoding_finds(tmp_path: Path) -> None:
    model = raw_data.box_model(tmp_path / "boxes.onnx", raw_data.ULTRALYTICS)
    data = yolo(tmp_path / "data")
    release = compiled(model, tmp_path, calibration=data, evaluation=data, metric="map50", quantize="precision=float32")
    report = release.report
    assert report is not None
    assert report.reference.value > 0.5
    config = release.bundles["generic-cpu"].config
    assert config.labels == raw_data.COLOURS
    assert config.pipeline is not None
    assert config.pipeline.boxes is not None
    assert (config.pipeline.boxes.head, config.pipeline.boxes.shares) == (Head.ANCHOR_FREE, False)
    detector = Model(tmp_path / "OUT", target="generic-cpu")
    for number in (0, 1):
        picture = tmp_path / "data" / "images" / "val" / f"{number}.png"
        expected = by_hand(model, np.asarray(Image.open(picture)))
        found = detector(picture)
        assert len(found) == len(expected.boxes) >= 3
        assert [box.index for box in found] == expected.classes.tolist()
        np.testing.assert_allclose([box.score for box in found], expected.scores, atol=0.02)
        np.testing.assert_allclose([(b.x1, b.y1, b.x2, b.y2) for b in found], expected.boxes, atol=0.5)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_arrays_may_hold_pixels_or_the_models_own_tensors(tmp_path: Path, dtype: type[np.generic]) -> None:
    model = raw_data.box_model(tmp_path / "boxes.onnx", raw_data.ULTRALYTICS)
    drawn = [raw_data.boxed(np.random.default_rng(number), (64, 32)) for number in range(20)]
    pixels = np.stack([one.transpose(2, 0, 1) for one, _ in drawn])
    arrays = pixels if dtype is np.uint8 else pixels.astype(np.float32) / 255
    labels = np.array([[[*row, 0] for row in rows] for _, rows in drawn], np.float32)
    np.savez(tmp_path / "c.npz", images=arrays[:10])
    np.savez(tmp_path / "e.npz", images=arrays[10:], label=labels[10:])
    files = {"calibration": tmp_path / "c.npz", "evaluation": tmp_path / "e.npz"}
    release = compiled(model, tmp_path, metric="map50", quantize="precision=float32", **files)
    assert release.report is not None
    assert release.report.reference.value > 0.5
    said = [one for one in release.report.warnings if "normalization is undone" in one]
    assert len(said) == (0 if dtype is np.uint8 else 2)
    detector = Model(tmp_path / "OUT", target="generic-cpu")
    assert len(detector(drawn[0][0])) == 3
    assert detector.raw(pixels[:1]).max() > 0.5


def test_coco_json_gives_the_same_labels_as_yolo(tmp_path: Path) -> None:
    model = raw_data.box_model(tmp_path / "boxes.onnx")
    rng = np.random.default_rng(1)
    images, annotations = [], []
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number in range(10):
        pixels, rows = raw_data.boxed(rng)
        Image.fromarray(pixels).save(tmp_path / "data" / "images" / f"{number}.png")
        images.append({"id": 100 + number, "file_name": f"{number}.png", "width": 128, "height": 64})
        for kind, x1, y1, x2, y2 in rows:
            box = [x1 * 128, y1 * 64, (x2 - x1) * 128, (y2 - y1) * 64]
            annotations.append({"image_id": 100 + number, "category_id": 5 + int(kind), "bbox": box})
    categories = [{"id": 5 + kind, "name": name} for kind, name in enumerate(raw_data.COLOURS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "data" / "instances.json").write_text(json.dumps(content), encoding="utf-8")
    data = tmp_path / "data"
    release = compiled(
        model, tmp_path, calibration=data, evaluation=data, task="detection", quantize="precision=float32"
    )
    assert release.report is not None
    assert release.report.metric == "map"
    # Boxes of 20 pixels over objects of 16: an overlap of 0.64, so three of COCO's ten thresholds are met.
    assert release.report.reference.value == pytest.approx(0.3)
    assert release.bundles["generic-cpu"].config.labels == raw_data.COLOURS


def test_wav_files_with_a_csv_wav_in_and_label_out(tmp_path: Path) -> None:
    model = raw_data.tone_model(tmp_path / "tones.onnx")
    data = raw_data.tones(tmp_path / "tones")
    pipeline = tmp_path / "pipeline.toml"
    pipeline.write_text(f'task = "audio-classification"\n[sound]\nsample_rate = {raw_data.RATE}\n', encoding="utf-8")
    release = compiled(model, tmp_path, calibration=data, evaluation=data, pipeline=pipeline)
    assert release.report is not None
    assert (release.report.metric, release.report.reference.value) == ("top1", 1.0)
    answer = Model(tmp_path / "OUT", target="generic-cpu")(str(data / "3.wav"))
    assert answer[0].name == "low"
    assert sum(one.score for one in answer) == pytest.approx(1.0, abs=1e-4)


def test_lines_of_text_in_json_lines_label_out(tmp_path: Path) -> None:
    model = raw_data.word_model(tmp_path)
    lines = [{"text": f"the day is {word}", "label": "positive" if word in ("good", "fine") else "negative"}
             for word in ("good", "bad", "fine", "poor") * 4]  # fmt: skip
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    data = {"calibration": tmp_path / "train.jsonl", "evaluation": tmp_path / "val.jsonl"}
    release = compiled(model, tmp_path, task="text-classification", **data)
    assert release.report is not None
    assert (release.report.metric, release.report.reference.value) == ("top1", 1.0)
    model_ = Model(tmp_path / "OUT", target="generic-cpu")
    answers = model_(["good good day", "poor"])
    assert [one[0].name for one in answers] == ["positive", "negative"]
    assert json.loads(json.dumps(to_json(answers[0])))[0]["name"] == "positive"


def test_a_python_iterable_of_batches_with_labels(tmp_path: Path) -> None:
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    model = raw_data.colour_model(tmp_path / "colours.onnx")
    rng = np.random.default_rng(0)
    kinds = np.arange(24) % 3
    pixels = rng.random((24, 3, 32, 32), dtype=np.float32)
    pixels[np.arange(24), kinds] += 0.5
    loader = DataLoader(TensorDataset(torch.from_numpy(pixels), torch.from_numpy(kinds)), batch_size=5)

    def samples() -> Iterator[Array]:
        yield from pixels

    release = compiled(model, tmp_path, calibration=samples(), evaluation=loader)
    assert release.report is not None
    assert (release.report.metric, release.report.reference.value) == ("top1", 1.0)
    assert release.bundles["generic-cpu"].config.provenance.evaluation_samples == 24

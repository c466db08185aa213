"""Networks of today with fresh weights, a Keras application and estimators of scikit-learn, on three targets; an export
with Ultralytics' metadata. Marked ``zoo``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from PIL import Image
from tests.support import detections, own_detector, requirements, shapes, today, zoo
from tests.support.zoo import CALIBRATION, EVALUATION, FRESH

import kedge
import kedge_agent
from kedge_protocol.errors import KedgeError

Array = npt.NDArray[Any]

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(7200)]

TARGETS = ("generic-cpu", "intel-cpu", "rpi4")


def torch_model(name: str, folder: Path) -> tuple[Any, Callable[[Array], Array], str]:
    """What is compiled; pictures → the scores of the float network; the name of its input."""
    import torch

    network = today.torch_network(name)

    def answers(pictures: Array) -> Array:
        with torch.no_grad():
            return np.asarray(network(torch.from_numpy(pictures)).numpy())

    return network, answers, "pictures"


def keras_model(name: str, folder: Path) -> tuple[Any, Callable[[Array], Array], str]:
    """The same; of Keras itself."""
    requirements.package("keras")
    model = today.keras_application(folder / "model.keras")
    return folder / "model.keras", lambda pictures: np.asarray(model.predict(pictures, verbose=0)), model.inputs[0].name


_MAKERS = {
    "convnext": torch_model, "vit": torch_model, "efficientnet": torch_model, "keras-mobilenet": keras_model
}  # fmt: skip


def compiled(source: Any, target: str, folder: Path, **more: Any) -> dict[str, Any] | KedgeError:
    """The report's line of the bundle in ``OUT``; or why there is none."""
    try:
        kedge.compile(
            source,
            name="today",
            version="1",
            targets=[target],
            calibration=folder / "c.npz",
            evaluation=folder / "e.npz",
            out=folder / "OUT",
            **more,
        )
    except KedgeError as error:
        return error
    report = json.loads((folder / "OUT" / "report.json").read_text())
    return {"metric": report["metric"], **report["bundles"][0]}


def judged(row: dict[str, Any], line: dict[str, Any], want: Array, got: Array, labels: Array) -> None:
    """Keep the row, with the drop on fresh samples beside the report's; it may be as far off as both spread."""
    right = [(one.reshape(len(one), -1).argmax(axis=1) == labels).astype(np.float64) for one in (want, got)]
    agreement = float(np.mean(want.reshape(len(want), -1).argmax(1) == got.reshape(len(got), -1).argmax(1)))
    drop = float(right[0].mean() - right[1].mean())
    interval = line["interval"]
    reach = interval["high"] - line["drop"] if drop > line["drop"] else line["drop"] - interval["low"]
    wrong = abs(drop - line["drop"]) > float(reach) * float(np.sqrt(1 + EVALUATION / len(want)))
    zoo.keep(
        row
        | {
            "label": line["label"],
            "precision": line["precision"],
            "metric": f"drop of {line['metric']}",
            "float": float(right[0].mean()),
            "reported": line["drop"],
            "true": drop,
            "agreement reported": line["agreement"],
            "agreement": agreement,
            "wrong": wrong,
            "size": line["size_ratio"],
        }
    )
    assert not wrong, (drop, line)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", sorted(_MAKERS))
def test_a_network_with_fresh_weights_loses_what_the_report_says(name: str, target: str, tmp_path: Path) -> None:
    source, answers, given = _MAKERS[name](name, tmp_path)
    ready = today.channels_last if name.startswith("keras") else np.asarray
    pictures, labels = today.pictures(EVALUATION, 1)
    np.savez(tmp_path / "c.npz", **{given: ready(today.pictures(CALIBRATION, 0)[0])})
    np.savez(tmp_path / "e.npz", **{given: ready(pictures)}, label=labels)
    row: dict[str, Any] = {"model": name, "target": target}
    line = compiled(source, target, tmp_path)
    if isinstance(line, KedgeError):
        zoo.keep(row | {"refused": str(line)})
        assert target == "rpi4", line
        assert line.remedy
        return
    pictures, labels = today.pictures(FRESH, 2)
    fresh = ready(pictures)
    model = kedge_agent.Model(tmp_path / "OUT", target=target)
    got = np.concatenate([np.asarray(model(one[None])).reshape(1, -1) for one in fresh])
    want = answers(fresh)
    assert np.mean(want.argmax(1) == labels) > 2 / want.shape[1], "the float network guesses"
    judged(row, line, want, got, labels)


def estimators() -> dict[str, Any]:
    """Fitted on digits, from 64 numbers to one of ten."""
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    return {
        "forest": RandomForestClassifier(60, random_state=0),
        "boosting": GradientBoostingClassifier(n_estimators=20, max_depth=3, random_state=0),
        "machine": make_pipeline(StandardScaler(), SVC(random_state=0)),
    }


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["forest", "boosting", "machine"])
def test_an_estimator_gives_its_labels(name: str, target: str, tmp_path: Path) -> None:
    pytest.importorskip("skl2onnx")
    from sklearn.datasets import load_digits

    digits, which = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(digits))
    digits, which = digits[order].astype(np.float32), which[order].astype(np.int64)
    fitted = estimators()[name].fit(digits[:1000], which[:1000])
    np.savez(tmp_path / "c.npz", input=digits[1000 : 1000 + CALIBRATION])
    np.savez(tmp_path / "e.npz", input=digits[1100 : 1100 + EVALUATION], label=which[1100 : 1100 + EVALUATION])
    row: dict[str, Any] = {"model": f"scikit-learn {name}", "target": target}
    line = compiled(fitted, target, tmp_path)
    if isinstance(line, KedgeError):
        zoo.keep(row | {"refused": str(line)})
        assert target == "rpi4", line
        assert line.remedy
        return
    fresh, labels = digits[1300:], which[1300:]
    answer = kedge_agent.Model(tmp_path / "OUT", target=target)(fresh)
    want = fitted.predict(fresh)
    assert np.array_equal(np.asarray(answer["label"]).reshape(-1), want)
    scores = np.eye(10)[want], np.eye(10)[np.asarray(answer["label"]).reshape(-1)]
    judged(row, line, *scores, labels)


def exported(path: Path) -> Path:
    """The detector of our own training with the metadata that Ultralytics' exporter writes."""
    model = onnx.load(str(own_detector.trained()))
    facts = {
        "description": "Ultralytics-like detector", "stride": str(max(own_detector.STRIDES)), "task": "detect",
        "batch": "1", "imgsz": str([shapes.SIZE, shapes.SIZE]), "names": str(dict(enumerate(shapes.KINDS))),
    }  # fmt: skip
    onnx.helper.set_model_props(model, facts)
    onnx.save(model, str(path))
    return path


def folders(root: Path, parts: dict[str, tuple[int, int]]) -> Path:
    """Pictures and text labels as YOLO's tools write them, by part: how many, seed; the ``data.yaml``."""
    for part, (count, seed) in parts.items():
        pixels, truth = shapes.pictures(count, seed=seed)
        for kind in ("images", "labels"):
            (root / kind / part).mkdir(parents=True)
        for number, (one, found) in enumerate(zip(pixels, truth, strict=True)):
            Image.fromarray(one.transpose(1, 2, 0)).save(root / "images" / part / f"{number:04d}.png")
            shares = found.boxes / shapes.SIZE
            lines = [
                f"{kind} {(x1 + x2) / 2:.6f} {(y1 + y2) / 2:.6f} {x2 - x1:.6f} {y2 - y1:.6f}"
                for kind, (x1, y1, x2, y2) in zip(found.classes, shares, strict=True)
            ]
            (root / "labels" / part / f"{number:04d}.txt").write_text("\n".join(lines))
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(shapes.KINDS))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return root / "data.yaml"


@pytest.mark.parametrize("target", TARGETS)
def test_an_export_with_its_metadata_and_a_data_yaml_are_enough(target: str, tmp_path: Path) -> None:
    data = folders(tmp_path / "data", {"train": (96, 41), "val": (200, 42)})
    source = exported(tmp_path / "best.onnx")
    kedge.compile(
        source, name="best", version="1", targets=[target], calibration=data, evaluation=data, metric="map",
        out=tmp_path / "OUT", max_drop=0.01,
    )  # fmt: skip
    model = kedge_agent.Model(tmp_path / "OUT", target=target)
    pixels, truth = shapes.pictures(100, seed=43)
    got = []
    for one in pixels:
        found = model(np.ascontiguousarray(one.transpose(1, 2, 0)))
        assert {box.label for box in found} <= set(shapes.KINDS)
        got.append(
            detections.Found(
                np.array([[box.x1, box.y1, box.x2, box.y2] for box in found]).reshape(-1, 4),
                np.array([box.score for box in found]),
                np.array([box.index for box in found], dtype=np.int64),
            )
        )
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    line = report["bundles"][0]
    truly = detections.f1(truth, got)
    zoo.keep(
        {
            "model": "export with metadata",
            "target": target,
            "label": line["label"],
            "metric": report["metric"],
            "reported": line["value"],
            "F1 of named boxes against the truth": truly,
            "size": line["size_ratio"],
        }
    )
    assert truly > 0.7

"""Installed bundles with pipelines: a detector whose finds go on to a classifier, over HTTP too, proved by examples."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.support import raw_data
from tests.support.installed import install
from tests.support.serving import ask

import kedge
from kedge_agent import Model
from kedge_agent.counters import collect
from kedge_agent.infer_command import infer
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_agent.slots import ModelFolder
from kedge_targets import proof
from kedge_targets.pipeline import examples

PICTURE_SIDES = (64, 128)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device with a detector that goes on to a classifier, and the classifier."""
    folder = tmp_path_factory.mktemp("device")
    rng = np.random.default_rng(3)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(10):
        Image.fromarray(raw_data.boxed(rng)[0]).save(pictures / f"{number}.png")
    (folder / "boxes.toml").write_text('task = "detection"\n[then]\nmodel = "colours"\nlabels = ["red", "blue"]\n')
    labels = folder / "labels.txt"
    labels.write_text("\n".join(raw_data.COLOURS))
    for name, make, how in (
        ("boxes", raw_data.box_model, {"pipeline": folder / "boxes.toml"}),
        ("colours", raw_data.colour_model, {"task": "classification"}),
    ):
        kedge.compile(
            make(folder / f"{name}.onnx"), name=name, version="1", targets=["generic-cpu"], calibration=pictures,
            evaluation=pictures, labels=labels, out=folder / name, quantize="precision=float32", max_drop=1.0, **how,
        )  # fmt: skip
        install(folder / "state", folder / name)
    return folder


def test_what_a_detector_finds_goes_on_to_a_classifier(state: Path) -> None:
    pixels, rows = raw_data.boxed(np.random.default_rng(5))
    with Model("boxes", state=state / "state") as model:
        found = model(pixels)
        streamed = list(model.stream([pixels, pixels, pixels, pixels]))
    assert sorted(box.index for box in found) == sorted(int(row[0]) for row in rows)
    for box in found:
        assert (box.then is None) == (box.label == "green")
        assert box.then is None or box.then[0].name == box.label
    assert streamed == [found] * 4


def test_the_same_answer_over_http(state: Path, tmp_path: Path) -> None:
    models = ServedModels(state / "state")
    models.scan()
    handler = InferenceHandler(models)
    picture = tmp_path / "a.png"
    Image.fromarray(raw_data.boxed(np.random.default_rng(5))[0]).save(picture)
    path = "/v2/models/boxes/pipeline"
    answer = ask(handler, "POST", path, picture.read_bytes(), content_type="image/png")
    assert answer.status == 200
    with Model("boxes", state=state / "state") as model:
        expected = model(picture)
    assert [box["label"] for box in answer.body["answer"]] == [box.label for box in expected]
    assert answer.body["answer"][0]["x1"] == pytest.approx(expected[0].x1)
    assert ask(handler, "POST", path, b"no picture", content_type="image/png").status == 400
    assert ask(handler, "POST", path, b"a text", content_type="text/plain").status == 415
    assert ask(handler, "GET", path).status == 405
    (counted,) = ask(handler, "GET", "/v2/models/boxes/stats").body["model_stats"]
    assert counted["inference_stats"]["success"]["count"] == counted["execution_count"] == 1
    assert counted["inference_stats"]["fail"]["count"] == 2
    # What it found went on to the model that is served, and was counted there by the agent's counters.
    assert collect(ModelFolder(state / "state", "colours").counters).inferences >= 1
    models.unload(models.versions("colours")[0])
    assert "does not serve" in ask(handler, "POST", path, picture.read_bytes(), content_type="image/png").body["error"]


def test_one_inference_at_the_terminal_takes_a_picture(state: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(raw_data.coloured(1, np.random.default_rng(0))).save(picture)
    said = json.loads(infer("colours", [str(picture)], state=state / "state"))
    assert said["answer"][0]["name"] == "green"
    np.save(tmp_path / "a.npy", np.zeros((1, 3, 32, 32), np.uint8))
    assert len(json.loads(infer("colours", [str(tmp_path / "a.npy")], state=state / "state"))["scores"][0]) == 3


def at_the_terminal(*arguments: str | Path, given: bytes = b"") -> Any:
    """What ``kedge-agent infer`` prints."""
    command = [sys.executable, "-m", "kedge_agent.cli", "infer", *map(str, arguments)]
    return json.loads(subprocess.run(command, input=given, capture_output=True, check=True, timeout=300).stdout)


def test_a_picture_comes_through_a_pipe_and_a_release_with_one_target_needs_no_name(
    state: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    Image.fromarray(raw_data.coloured(2, np.random.default_rng(0))).save(picture)
    release = state / "colours"
    piped = at_the_terminal(release, "--input", "-", given=picture.read_bytes())
    assert piped == at_the_terminal(release, "--input", picture)
    assert piped["answer"][0]["name"] == "blue"
    numbers = json.dumps(np.zeros((1, 3, 32, 32)).tolist()).encode()
    assert len(at_the_terminal(release, "--input", "-", given=numbers)["scores"][0]) == 3


def test_a_sentence_comes_from_a_file_or_through_a_pipe(tmp_path: Path) -> None:
    lines = [{"text": f"the day is {word}", "label": "positive" if word in ("good", "fine") else "negative"}
             for word in ("good", "bad", "fine", "poor") * 4]  # fmt: skip
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    kedge.compile(
        raw_data.word_model(tmp_path), name="mood", version="1", targets=["generic-cpu"],
        calibration=tmp_path / "lines.jsonl", evaluation=tmp_path / "lines.jsonl", task="text-classification",
        out=tmp_path / "OUT", quantize="precision=float32", max_drop=1.0,
    )  # fmt: skip
    sentence = tmp_path / "sentence.txt"
    for text, expected in (("good fine day\n", "positive"), ("poor bad", "negative")):
        sentence.write_text(text)
        read = at_the_terminal(tmp_path / "OUT", "--input", sentence)
        assert read == at_the_terminal(tmp_path / "OUT", "--input", "-", given=text.encode())
        assert read["answer"][0]["name"] == expected


def test_kept_answers_follow_the_file_and_not_its_name(state: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    with Model("colours", state=state / "state", cache_mib=1) as model:
        for kind in (0, 2):
            Image.fromarray(raw_data.coloured(kind, np.random.default_rng(0))).save(picture)
            answers = [model(picture), model(str(picture)), model(picture.read_bytes())]
            assert [one[0].name for one in answers] == [raw_data.COLOURS[kind]] * 3
        assert model.cache is not None
        assert (model.cache.hits, model.cache.misses) == (4, 2)


def test_examples_that_do_not_hold_are_told_before_the_bundle_serves(state: Path, tmp_path: Path) -> None:
    slot = ModelFolder(state / "state", "colours").current()
    assert slot is not None
    folder = tmp_path / "slot"
    folder.mkdir()
    for path in slot.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "config.json"
    config.write_bytes(slot.bundle().config_raw)
    request = proof.ProveRequest(folder=str(folder), config=str(config))
    assert proof.prove(request, lambda *_: None).holds
    kept = examples.load(folder / examples.FILE)
    assert kept
    assert base64.b64decode(kept[0].data).startswith(b"\xff\xd8")
    wrong = [{**one, "index": (one["index"] + 1) % 3} for one in kept[0].answer]
    examples.save([replace(kept[0], answer=wrong)], folder / examples.FILE)
    answer = proof.prove(request, lambda *_: None)
    assert not answer.holds
    assert "the pipeline's answer to example 0" in answer.reason
    assert json.loads(config.read_bytes())["pipeline"]["picture"]["fit"] == "crop"

"""Device and cloud together: a small model asks a larger one at a second ``kedge-agent serve``, which is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image
from tests.support import raw_data
from tests.support.ports import free_port
from tests.support.standalone import Served, serving
from tests.support.waiting import wait_for

import kedge
from kedge_agent import Model
from kedge_protocol.bundle.pipeline import Activation
from kedge_protocol.errors import ConfigError, DatasetError

DEADLINE_MS = 20_000
PIPELINE = """task = "classification"
[scores]
top = 1
[cascade]
url = "http://127.0.0.1:{port}"
model = "large"
share = {share}
deadline_ms = {deadline}
"""
PATH = "/v2/models/small/pipeline"


def unsure_of_blue(path: Path) -> Path:
    """A model of colours that cannot tell blue from the others, and knows it: the three scores are then about equal."""
    model = onnx.load(raw_data.colour_model(path))
    weights = np.array([[4, 0, 2], [0, 4, 2], [0, 0, 0]], np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weights, "w"))
    onnx.save(model, path)
    return path


def picture(kind: int, seed: int = 0) -> bytes:
    """A JPEG of one colour."""
    buffer = io.BytesIO()
    Image.fromarray(raw_data.coloured(kind, np.random.default_rng(seed))).save(buffer, "JPEG")
    return buffer.getvalue()


@dataclass
class World:
    folder: Path
    port: int

    def compile(self, model: Path, name: str, version: str, **how: Any) -> Path:
        pictures = self.folder / "pictures"
        if not pictures.exists():
            raw_data.class_folders(pictures, 20)
        out = self.folder / f"{name}-{version}"
        kedge.compile(
            model, name=name, version=version, targets=["generic-cpu"], calibration=pictures, evaluation=pictures,
            labels=self.labels, out=out, quantize="precision=float32", max_drop=1.0, **how,
        )  # fmt: skip
        return out

    @property
    def labels(self) -> Path:
        path = self.folder / "labels.txt"
        path.write_text("\n".join(raw_data.COLOURS))
        return path

    def pipeline(self, share: float, deadline: int = DEADLINE_MS) -> Path:
        path = self.folder / f"pipeline-{share}-{deadline}.toml"
        path.write_text(PIPELINE.format(port=self.port, share=share, deadline=deadline))
        return path

    @property
    def cloud(self) -> tuple[str, ...]:
        return str(self.folder / "large-7"), "--listen", f"127.0.0.1:{self.port}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A larger model, and a small one compiled while the larger one serves."""
    made = World(tmp_path_factory.mktemp("cascade"), free_port())
    made.compile(raw_data.colour_model(made.folder / "large.onnx"), "large", "7", task="classification")
    small = unsure_of_blue(made.folder / "small.onnx")
    with pytest.raises(ConfigError, match="cannot be asked"):
        made.compile(small, "small", "0", pipeline=made.pipeline(0.5))
    with serving(*made.cloud) as cloud:
        cloud.wait()
        made.compile(small, "small", "1", pipeline=made.pipeline(0.5))
        made.compile(small, "small", "2", pipeline=made.pipeline(0.1))
    return made


def figures(world: World, version: str) -> Any:
    report = json.loads((world.folder / f"small-{version}" / "report.json").read_text())
    return report["bundles"][0]["cascade"]


def test_the_report_tells_what_the_larger_model_gains_for_which_share(world: World) -> None:
    whole, bounded = figures(world, "1"), figures(world, "2")
    assert whole["larger_accuracy"] == whole["accuracy"] == 1.0
    assert whole["share"] == pytest.approx(1 / 3, abs=0.02)
    assert whole["device_accuracy"] == bounded["device_accuracy"] == pytest.approx(2 / 3, abs=0.02)
    assert bounded["device_accuracy"] < bounded["accuracy"] < 0.85
    assert bounded["share"] <= 0.2, "cross-fitted it may miss the bound on so few samples, by little"
    assert (whole["model"], whole["chosen"], whole["late"]) == ("large 7", True, 0)
    # Each item's time alone and what the larger model adds: equal where a busy machine disturbed items that stay here.
    assert whole["together_ms"]["p95"] >= whole["device_ms"]["p95"] > 0
    page = (world.folder / "small-1" / "report.html").read_text()
    assert "together with <b>large 7</b>" in page


def test_a_stated_confidence_needs_no_labels(world: World, tmp_path: Path) -> None:
    plain = tmp_path / "pictures"
    plain.mkdir()
    for seed in range(12):
        (plain / f"{seed}.jpg").write_bytes(picture(seed % 3, seed))
    stated = tmp_path / "stated.toml"
    stated.write_text(PIPELINE.format(port=world.port, share=0.5, deadline=DEADLINE_MS) + "below = 0.9\n")
    how: dict[str, Any] = {
        "name": "small",
        "version": "3",
        "targets": ["generic-cpu"],
        "calibration": plain,
        "evaluation": plain,
        "labels": world.labels,
        "quantize": "precision=float32",
        "max_drop": 1.0,
    }
    with serving(*world.cloud) as cloud:
        cloud.wait()
        release = kedge.compile(world.folder / "small.onnx", pipeline=stated, out=tmp_path / "OUT", **how)
        with pytest.raises(DatasetError, match="no class numbers"):
            kedge.compile(world.folder / "small.onnx", pipeline=world.pipeline(0.5), out=tmp_path / "OTHER", **how)
    pipeline = release.bundles["generic-cpu"].config.pipeline
    assert pipeline is not None
    assert pipeline.cascade is not None
    assert pipeline.cascade.below == 0.9
    assert pipeline.cascade.activation is Activation.NONE
    assert json.loads((tmp_path / "OUT" / "report.json").read_text())["bundles"][0].get("cascade") is None


def served_samples(served: Served) -> int:
    """How many samples a larger model has got."""
    (row,) = served.ask("GET", "/v2/models/large/stats")[1]["model_stats"]
    return int(row["inference_count"])


def outcome(served: Served) -> dict[str, int]:
    (row,) = served.ask("GET", "/v2/models/small/stats")[1]["model_stats"]
    return {key: count for key, count in row["cascade"].items() if count}


def test_unsure_answers_come_from_the_cloud_and_when_it_is_killed_from_the_device(world: World) -> None:
    with serving(str(world.folder / "small-1"), "--listen", "127.0.0.1:0") as device:
        device.wait()
        with serving(*world.cloud) as cloud:
            cloud.wait()
            status, blue = device.send(PATH, picture(2), "image/jpeg")
            assert (status, blue["answer"][0]["name"], blue["answer"][0]["by"]) == (200, "blue", "large 7")
            assert blue["answered_by"] == {"model_name": "large", "model_version": "7"}
            red = device.send(PATH, picture(0), "image/jpeg")[1]
            assert (red["answer"][0]["name"], "by" in red["answer"][0]) == ("red", False)
            assert red["answered_by"] == {"model_name": "small", "model_version": "1"}
            assert outcome(device) == {"escalated": 1, "sure": 1}
            asking = [threading.Thread(target=lambda: answers.append(device.send(PATH, picture(2), "image/jpeg")))
                      for _ in range(6)]  # fmt: skip
            answers: list[tuple[int, Any]] = []
            for number, thread in enumerate(asking):
                thread.start()
                if number == 2:
                    cloud.kill()
            for thread in asking:
                thread.join()
        assert {status for status, _ in answers} == {200}
        for _ in range(4):
            status, blue = device.send(PATH, picture(2), "image/jpeg")
            assert (status, blue["answered_by"]["model_name"]) == (200, "small")
        seen = outcome(device)
        assert seen["away"] >= 3
        assert seen["paused"] + seen.get("withheld", 0) >= 1
        metrics = device.text("/metrics")
        assert f'kedge_cascade_items_total{{model="small",outcome="away"}} {seen["away"]}' in metrics
        # The cloud comes back, and is found again.
        with serving(*world.cloud) as cloud:
            cloud.wait()
            for _ in range(400):
                device.send(PATH, picture(0), "image/jpeg")  # the share grows with every item
                blue = device.send(PATH, picture(2), "image/jpeg")[1]
                if blue["answered_by"]["model_name"] == "large":
                    break
                threading.Event().wait(0.1)
            assert blue["answered_by"]["model_name"] == "large"


def test_a_cloud_that_hangs_holds_nobody_else_up(world: World) -> None:
    with serving(*world.cloud) as cloud, serving(str(world.folder / "small-1"), "--listen", "127.0.0.1:0") as device:
        cloud.wait()
        device.wait()
        assert device.send(PATH, picture(2), "image/jpeg")[1]["answered_by"]["model_name"] == "large"
        device.send(PATH, picture(0), "image/jpeg")
        stopped = (cloud.process.pid, cloud.child)  # its agent first, which would replace a child that hangs
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            order: list[str] = []

            def ask() -> None:
                answer = device.send(PATH, picture(2), "image/jpeg")[1]
                order.append(answer["answered_by"]["model_name"])

            waiting = threading.Thread(target=ask)
            waiting.start()
            wait_for(lambda: outcome(device).get("under_way"), what="a call of the cloud")
            meanwhile = 0
            for seed in range(20):
                answer = device.send(PATH, picture(0, seed), "image/jpeg")[1]
                assert answer["answer"][0]["name"] == "red"
                meanwhile += not order
            assert meanwhile, "others are answered while one waits for the cloud"
            waiting.join()
            assert order == ["small"]
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


def test_a_model_in_a_process_of_its_own_asks_the_cloud_where_the_device_allows_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(*world.cloud) as cloud, Model(world.folder / "small-1", target="generic-cpu") as silent:
        cloud.wait()
        assert silent(raw_data.coloured(2, np.random.default_rng(1)))[0].by is None
        assert silent.cascade is None
        assert served_samples(cloud) == 0, "nothing left the device"
    monkeypatch.setenv("KEDGE_CASCADE", "on")
    with serving(*world.cloud) as cloud, Model(world.folder / "small-1", target="generic-cpu") as model:
        cloud.wait()
        blue = raw_data.coloured(2, np.random.default_rng(1))
        red = raw_data.coloured(0, np.random.default_rng(1))
        assert [label.by for label in model(blue)] == ["large 7"]
        streamed = [label.by for (label,) in model.stream([red, blue, red, red])]
        assert streamed == [None, "large 7", None, None]
        assert model.cascade is not None
        assert (model.cascade.sure, model.cascade.escalated) == (3, 2)
        cloud.kill()
        assert [(label.by, label.name) for label in model(blue)] == [(None, model(blue)[0].name)]

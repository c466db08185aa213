"""A model that got worse on one class, without an error, is told by its shadow: from the agreement on that class."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.support.brokers import Mosquitto
from tests.support.field import DEVICE, Field, agent_of

from kedge.demo.processes import command_of, run, wait_until
from kedge.fleet import shadows
from kedge.fleet.service import FleetService

WORSE = 3
"""The class (a cat) that the newer model hardly ever gives."""


def worse(model: Path, out: Path) -> None:
    """The same network with a lower last bias of one class, as a training on too few cats would leave it."""
    graph = onnx.load(model)
    biases = [one for one in graph.graph.initializer if list(one.dims) == [10]]
    values = numpy_helper.to_array(biases[-1]).copy()
    values[WORSE] -= 6.0
    biases[-1].CopyFrom(numpy_helper.from_array(values, biases[-1].name))
    onnx.save(graph, out)


@pytest.mark.campaign
@pytest.mark.shared_data
@pytest.mark.needs("mosquitto")
def test_the_class_on_which_the_newer_model_is_worse_is_found_on_live_inputs(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    data = np.load(shared_data / "eval" / "ic.npz")
    np.savez(tmp_path / "eval.npz", input=data["input"], label=data["label"])
    models = {"1.0": shared_data / "models" / "ic_resnet8.onnx", "2.0": tmp_path / "worse.onnx"}
    worse(models["1.0"], models["2.0"])
    for version, model in models.items():
        arguments = [
            "--name",
            "ic",
            "--version",
            version,
            "--target",
            "generic-cpu",
            "--max-drop",
            "0.1",
            "-o",
            str(tmp_path / version),
        ]
        arguments += ["--calibration", str(tmp_path / "eval.npz"), "--evaluation", str(tmp_path / "eval.npz")]
        run([command_of("kedge"), "compile", str(model), *arguments], echo=False)
    with Field(tmp_path, mosquitto.url) as field:
        device = field.add("cam", "generic-cpu", agent_of(DEVICE))
        for version in models:
            field.publish(tmp_path / version)
        field.start_rollout("ic:1.0")
        assert set(field.decided().values()) == {"done"}, field.reasons()
        field.kedge("shadow", "start", "ic:2.0", "--share", "0.2")
        enough = threading.Event()

        def call() -> None:
            chance = np.random.default_rng(7)
            while not enough.wait(0.06):
                device.infer("ic", "input", data["input"][chance.integers(200)][None])

        caller = threading.Thread(target=call)
        caller.start()

        def seen() -> shadows.ShadowView | None:
            with FleetService(field.state) as service:
                (view,) = shadows.show(service, "ic")
            return view if view.compared >= 250 else None

        try:
            view = wait_until("250 compared pictures", seen, seconds=200)
        finally:
            enough.set()
            caller.join()
        assert view.errors == 0
        assert view.worst is not None
        assert view.worst[0] == str(WORSE)
        assert view.worst[1] < 0.6
        others = [agreed / compared for name, (compared, agreed) in view.classes.items() if name != str(WORSE)]
        assert np.mean(others) > 0.95
        # What served goes on, and users had its answers all the time.
        assert field.shown("cam")["device"]["reported"]["models"]["ic"]["version"] == "1.0"
        field.kedge("shadow", "stop", "ic")

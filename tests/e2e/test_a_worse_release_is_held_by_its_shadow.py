"""A retrained model that is worse on one class, without an error: a whole rollout over real agents on the embedded
broker ends at the gate ``agreement``, before any device was switched."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
from tests.support import retrained
from tests.support.field import DEVICE, Device, Field, agent_of

from kedge.demo.processes import command_of, run, wait_until
from kedge.fleet.results import RolloutStatus
from kedge.fleet.service import FleetService


def _compiled(shared_data: Path, folder: Path) -> np.ndarray:
    """Releases 1.0 and 2.0, of which the latter is worse on one class; the pictures."""
    data = np.load(shared_data / "eval" / "ic.npz")
    np.savez(folder / "eval.npz", input=data["input"], label=data["label"])
    models = {"1.0": shared_data / "models" / "ic_resnet8.onnx", "2.0": folder / "retrained.onnx"}
    retrained.retrain(models["1.0"], models["2.0"], data["input"])
    for version, model in models.items():
        arguments = ["--name", "ic", "--version", version, "--target", "generic-cpu", "--max-drop", "0.1"]
        arguments += ["--calibration", str(folder / "eval.npz"), "--evaluation", str(folder / "eval.npz")]
        run([command_of("kedge"), "compile", str(model), *arguments, "-o", str(folder / version)], echo=False)
    pictures: np.ndarray = data["input"]
    return pictures


@pytest.mark.campaign
@pytest.mark.shared_data
def test_a_release_that_is_worse_on_one_class_is_held_and_nothing_was_switched(
    shared_data: Path, tmp_path: Path
) -> None:
    pictures = _compiled(shared_data, tmp_path)
    with Field(tmp_path) as field:
        for name in ("a", "b", "c"):
            field.add(name, "generic-cpu", agent_of(DEVICE))
        for version in ("1.0", "2.0"):
            field.publish(tmp_path / version)
        field.start_rollout("ic:1.0")
        assert set(field.decided().values()) == {"done"}, field.reasons()

        enough = threading.Event()

        def call(device: Device, seed: int) -> None:
            chance = np.random.default_rng(seed)
            while not enough.wait(0.06):
                device.infer("ic", "input", pictures[chance.integers(len(pictures))][None])

        callers = [threading.Thread(target=call, args=(one, place)) for place, one in enumerate(field.devices)]
        for caller in callers:
            caller.start()

        def ended() -> RolloutStatus | None:
            status = field.status()
            return status if status.stage is not None and status.stage.phase.value in ("aborted", "done") else None

        policy = ["--shadow", "0.25", "--soak", "30s", "--max-soak", "10m", "--waves", "100%"]
        field.kedge("rollout", "start", "ic:2.0", *policy)
        try:
            status = wait_until(f"the end of the rollout (logs in {tmp_path})", ended, seconds=400)
        finally:
            enough.set()
            for caller in callers:
                caller.join()
        assert status.stage is not None
        assert status.stage.phase.value == "aborted", status.stage
        assert status.stage.reason.startswith("agreement of generic-cpu")
        assert f"least class {retrained.WORSE}" in status.stage.reason
        with FleetService(field.state) as fleet:
            actions = [entry.action for entry in fleet.audit_log() if entry.subject == "rollout 2"]
        assert "rollout.shadow" in actions
        assert "rollout.abort" in actions
        for device in field.devices:
            model = field.shown(device.name)["device"]["reported"]["models"]["ic"]
            assert (model["version"], model.get("previous")) == ("1.0", None)

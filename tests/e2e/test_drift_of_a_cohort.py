"""Brightness-shifted pictures on one site raise the alarm for that site's devices, and for no other."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from tests.support.brokers import Mosquitto
from tests.support.field import DEVICE, Device, Field, agent_of

from kedge.demo.processes import command_of, run, wait_until
from kedge.fleet import drift
from kedge.fleet.service import FleetService

_PAUSE = 0.06
"""Seconds between two calls: at most twenty a second are looked at."""


@pytest.mark.shared_data
@pytest.mark.needs("mosquitto")
def test_the_alarm_names_the_cohort_that_shifted_and_no_other(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    data = np.load(shared_data / "eval" / "ic.npz")
    np.savez(tmp_path / "eval.npz", input=data["input"], label=data["label"])
    out = tmp_path / "OUT"
    arguments = ["--name", "ic", "--version", "1.0", "--target", "generic-cpu", "-o", str(out)]
    arguments += ["--calibration", str(tmp_path / "eval.npz"), "--evaluation", str(tmp_path / "eval.npz")]
    run([command_of("kedge"), "compile", str(shared_data / "models" / "ic_resnet8.onnx"), *arguments], echo=False)
    # The same scenes, mirrored: pictures of the same kind that the baseline does not hold.
    live = data["input"][:, :, ::-1]
    with Field(tmp_path, mosquitto.url) as field:
        for name, site in (("a", "berlin"), ("b", "rome"), ("c", "rome")):
            field.add(name, "generic-cpu", agent_of(DEVICE))
            field.kedge("device", "edit", name, "--label", f"site={site}")
        field.publish(out)
        field.start_rollout("ic:1.0")
        assert set(field.decided().values()) == {"done"}, field.reasons()

        enough = threading.Event()

        def call(device: Device, pictures: np.ndarray) -> None:
            chance = np.random.default_rng(7)
            while not enough.wait(_PAUSE):
                device.infer("ic", "input", pictures[chance.integers(len(pictures))][None])

        shifted = np.clip(live * 1.6 + 30, 0, 255).astype(np.float32)
        pictures = {"a": shifted, "b": live, "c": live}
        threads = [threading.Thread(target=call, args=(one, pictures[one.name])) for one in field.devices]
        for thread in threads:
            thread.start()

        def by_site() -> dict[str, drift.CohortDrift] | None:
            with FleetService(field.state) as service:
                found = {one.cohort["site"]: one for one in drift.cohorts(service.database, by=("site",))}
            samples = [one.streams[0].samples for one in found.values()]
            return found if len(samples) == 2 and min(samples) >= 80 else None

        try:
            found = wait_until("the sketches of both sites", by_site, seconds=300)
        finally:
            enough.set()
            for thread in threads:
                thread.join()
        berlin, rome = found["berlin"], found["rome"]
        assert [one.stream for one in berlin.alarms if one.stream == "input/input/mean"]
        assert rome.alarms == ()
        assert (berlin.devices, rome.devices) == (1, 2)
        shown = json.loads(field.kedge("drift", "--by", "site", "--json"))
        assert [one["cohort"] for one in shown] == [{"site": "berlin"}, {"site": "rome"}]
        assert "DRIFT" in field.kedge("drift", "--device", "a")
        assert "DRIFT" not in field.kedge("drift", "--device", "b")

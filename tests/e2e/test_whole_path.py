"""The whole path on a real broker: compile, publish, roll out, prove, serve, report; a bad release is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support.brokers import Mosquitto
from tests.support.field import DEVICE, LEGACY, Field, agent_of

from kedge.demo.processes import command_of, run, wait_until
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.bundle.write import new_layout

TARGETS = ("generic-cpu", "rpi4", "intel-cpu")


@pytest.mark.shared_data
@pytest.mark.needs("mosquitto")
def test_a_compiled_model_reaches_every_device_and_answers_there(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    data = np.load(shared_data / "eval" / "kws.npz")
    np.savez(tmp_path / "calib.npz", input=data["input"][:200])
    np.savez(tmp_path / "eval.npz", input=data["input"][200:], label=data["label"][200:])
    out = tmp_path / "OUT"
    arguments = ["--name", "kws", "--version", "1.0", *[part for target in TARGETS for part in ("--target", target)]]
    arguments += ["--calibration", str(tmp_path / "calib.npz"), "--evaluation", str(tmp_path / "eval.npz")]
    model = str(shared_data / "models" / "kws_dscnn.onnx")
    run([command_of("kedge"), "compile", model, *arguments, "-o", str(out)], echo=False)
    report = json.loads((out / "report.json").read_text())
    layout = Layout(out)
    with Field(tmp_path, mosquitto.url) as field:
        field.add("cpu", "generic-cpu", agent_of(DEVICE))
        field.add("pi", "rpi4", agent_of(DEVICE))
        field.add("old-pi", "rpi4", agent_of(LEGACY))
        field.add("intel", "intel-cpu", command_of("kedge-agent"))
        field.publish(out)
        field.start_rollout("kws:1.0", "site=test")
        assert set(field.decided().values()) == {"done"}, field.reasons()

        values = {bundle["target"]: bundle["value"] for bundle in report["bundles"]}
        specs = {target: layout.bundle(target).config.inputs[0] for target in TARGETS}
        rows = slice(200, 400)
        float_share = report["reference"]["value"]
        for device in field.devices:
            scores = device.infer("kws", specs[device.target].name, data["input"][rows])
            share = float((scores.argmax(axis=1) == data["label"][rows]).mean())
            # 200 of the 800 evaluated samples: the device computes what the host measured, not chance.
            assert abs(share - values[device.target]) < 0.05, device.name
            assert abs(share - float_share) < 0.06, device.name

        runtimes = field.shown("old-pi")["device"]["reported"]["runtimes"]
        assert runtimes["tflite-runtime"].startswith("2.14")
        assert "ai-edge-litert" not in runtimes
        for device in field.devices:
            digest = layout.bundle(device.target).digest
            telemetry = wait_until(
                f"telemetry of {device.name}",
                lambda device=device, digest=digest: [
                    seen["models"]["kws"]
                    for seen in field.shown(device.name)["telemetry"]
                    if seen["models"].get("kws", {}).get("inferences_total", 0) >= 200
                    and seen["models"]["kws"]["digest"] == digest
                ],
                seconds=120,
            )
            assert telemetry[-1]["errors_total"] == 0

        # A release whose golden vectors do not hold: every device refuses it, and goes on as before.
        field.publish(_with_other_answers(layout, tmp_path / "BAD"))
        before = [device.infer("kws", specs[device.target].name, data["input"][:5]) for device in field.devices]
        field.start_rollout("kws:2.0")
        assert set(field.decided().values()) == {"failed"}
        for device, answers in zip(field.devices, before, strict=True):
            reported = field.shown(device.name)["device"]["reported"]["models"]["kws"]
            assert reported["digest"] == layout.bundle(device.target).digest
            assert reported["failure"]["stage"] == "prove"
            assert "golden vectors do not hold" in reported["failure"]["reason"]
            np.testing.assert_array_equal(
                device.infer("kws", specs[device.target].name, data["input"][:5]), answers, device.name
            )

        field.kedge("rollout", "revert")
        assert set(field.decided().values()) == {"done"}, field.reasons()


def _with_other_answers(layout: Layout, out: Path) -> Path:
    """The same files, with golden vectors that expect the answers of other samples."""
    from kedge_protocol import digest, golden

    with new_layout(out) as writer:
        for target, descriptor in layout.release().bundles.items():
            bundle = layout.read_bundle(descriptor)
            vectors = golden.load(layout.blob_path(bundle.config.golden.digest))
            turned = {name: np.roll(value, 1, axis=0) for name, value in vectors.outputs.items()}
            file = out.parent / f"golden-{target}.npz"
            golden.save(replace(vectors, outputs=turned), file)
            reference = replace(bundle.config.golden, digest=digest.of_file(file))
            files = {
                title: layout.blob_path(layer.digest)
                for title, layer in bundle.files.items()
                if title != bundle.config.golden.file
            }
            writer.add_bundle(replace(bundle.config, version="2.0", golden=reference), files, file)
        writer.add_release("kws", "2.0")
    return out

"""What must not serve: damaged bundles with valid digests are refused by the agent on the device, with the reason,
while the old bundle goes on serving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tests.support.brokers import Mosquitto
from tests.support.compiling import shared_release
from tests.support.field import DEVICE, LEGACY, Field, agent_of

from kedge.compiler.release import Release
from kedge_protocol import digest
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.bundle.write import new_layout

pytestmark = [pytest.mark.shared_data, pytest.mark.needs("mosquitto")]

Change = Callable[[BundleConfig, Path], BundleConfig]


def zeroed_weights(config: BundleConfig, entry: Path) -> BundleConfig:
    """The largest weight tensor of 8 bits, all zeros."""
    if entry.suffix == ".onnx":
        model = onnx.load(entry)
        tensor = max(model.graph.initializer, key=lambda item: len(item.raw_data))
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.zeros_like(values), tensor.name))
        entry.write_bytes(model.SerializeToString())
    else:
        from ai_edge_litert import schema_py_generated as schema

        damaged = bytearray(entry.read_bytes())
        model = schema.Model.GetRootAs(damaged)
        buffers = [model.Buffers(index).DataAsNumpy() for index in range(model.BuffersLength())]
        max((data for data in buffers if not isinstance(data, int)), key=len)[:] = 0
        entry.write_bytes(damaged)
    return config


def swapped_layout(config: BundleConfig, _: Path) -> BundleConfig:
    """The input's axes as the file does not have them."""
    return _with_input(config, lambda spec: dataclasses.replace(spec.file, permutation=(0, 2, 1, 3)))


def wrong_scale(config: BundleConfig, _: Path) -> BundleConfig:
    """Every quantized tensor at the file's border half as large again; for a float border, the preprocessing."""
    if config.inputs[0].file.scale is not None:
        return _with_input(config, lambda spec: dataclasses.replace(spec.file, scale=(spec.file.scale or 0.0) * 1.5))
    from kedge_protocol.bundle.config import Preprocess

    changed = dataclasses.replace(config.inputs[0], preprocess=Preprocess(scale=(1.5,)))
    return dataclasses.replace(config, inputs=(changed,))


def _with_input(config: BundleConfig, change: Callable[[TensorSpec], object]) -> BundleConfig:
    spec = config.inputs[0]
    return dataclasses.replace(config, inputs=(dataclasses.replace(spec, file=change(spec)),))  # type: ignore[arg-type]


def repacked(release: Release, version: str, folder: Path, change: Change, targets: tuple[str, ...]) -> Path:
    """The release with each bundle changed; all digests are valid again."""
    layout = Layout(release.path)
    out = folder / f"OUT-{version}"
    with new_layout(out) as writer:
        for target in targets:
            bundle = release.bundles[target]
            work = folder / f"{version}-{target}"
            work.mkdir()
            files = {}
            for title, layer in bundle.files.items():
                files[title] = work / title
                files[title].write_bytes(layout.blob_path(layer.digest).read_bytes())
            golden = files.pop(bundle.config.golden.file)
            config = change(bundle.config, files[bundle.config.entry])
            writer.add_bundle(dataclasses.replace(config, version=version), files, golden)
        writer.add_release(release.name, version)
    return out


def test_damaged_bundles_are_refused_on_the_device_and_the_old_one_serves_on(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    release = shared_release(shared_data, "ic")
    targets = ("generic-cpu", "rpi4")
    images = np.load(shared_data / "eval" / "ic.npz")["input"][50:54]
    name = release.bundles["rpi4"].config.inputs[0].name
    with Field(tmp_path, mosquitto.url) as field:
        field.add("cpu", "generic-cpu", agent_of(DEVICE))
        field.add("pi", "rpi4", agent_of(DEVICE))
        field.add("old-pi", "rpi4", agent_of(LEGACY))
        field.publish(release.path)
        field.start_rollout("ic:1.0")
        assert set(field.decided().values()) == {"done"}, field.reasons()
        before = {device.name: device.infer("ic", name, images) for device in field.devices}
        for number, damage in enumerate((zeroed_weights, swapped_layout, wrong_scale), start=2):
            field.publish(repacked(release, f"{number}.0", tmp_path, damage, targets))
            field.start_rollout(f"ic:{number}.0")
            assert set(field.decided().values()) == {"failed"}, damage.__name__
            for device, reason in field.reasons().items():
                assert "golden vectors do not hold" in reason, (damage.__name__, device)
        for device in field.devices:
            np.testing.assert_array_equal(device.infer("ic", name, images), before[device.name], device.name)
            reported = field.shown(device.name)["device"]["reported"]["models"]["ic"]
            assert reported["digest"] == release.bundles[device.target].digest
            assert reported["proved"]


def test_a_file_that_the_runtime_rejects_is_refused_with_the_runtimes_own_reason(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    release = shared_release(shared_data, "ic")
    negative = shared_data / "models" / "person_detect_rejected_by_litert.tflite"

    def replaced(config: BundleConfig, entry: Path) -> BundleConfig:
        entry.write_bytes(negative.read_bytes())
        return config

    out = repacked(release, "9.0", tmp_path, replaced, ("rpi4",))
    entry = Layout(out).bundle("rpi4").config.entry
    assert Layout(out).bundle("rpi4").files[entry].digest == digest.of_file(negative)
    with Field(tmp_path, mosquitto.url) as field:
        field.add("pi", "rpi4", agent_of(DEVICE))
        field.publish(out)
        field.start_rollout("ic:9.0")
        assert field.decided() == {"pi": "failed"}
        assert "quantized_dimension" in field.reasons()["pi"]
        assert "ic" not in field.kedge("device", "list").split()

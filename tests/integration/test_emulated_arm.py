"""Bundles for ARM prove themselves by the device's own runtimes on emulated processors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support import compiling

from kedge.compiler.release import Release
from kedge_targets import toolchain
from kedge_targets.emulation import proving
from kedge_targets.emulation.proving import EmulationRequest

pytestmark = [pytest.mark.campaign, pytest.mark.shared_data, pytest.mark.needs("qemu-aarch64")]

TARGETS = {"rpi4": "cortex-a72", "rpi5": "cortex-a76", "generic-arm": "cortex-a53"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The emulated system, in a folder of its own beside the user's toolchain for TFLite."""
    own = tmp_path_factory.mktemp("data")
    tflite = toolchain.find("tflite").folder
    (own / "toolchains").mkdir()
    (own / "toolchains" / tflite.name).symlink_to(tflite)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEDGE_DATA", str(own))
        toolchain.install("aarch64")
        yield


@pytest.fixture(scope="module")
def release(installed: None, shared_data: Path) -> Release:
    # A run of its own: the others' releases are made without the emulated system.
    return compiling.shared_release(shared_data, "ic", run=77, targets=tuple(TARGETS))


@pytest.mark.parametrize("name", TARGETS)
def test_a_bundle_is_proved_on_its_kind_of_processor(release: Release, name: str) -> None:
    assert release.bundles[name].config.verified.value == "emulated"
    assert release.report is not None
    entry = next(one for one in release.report.bundles if one.target == name)
    note = next(one for one in entry.notes if TARGETS[name] in one)
    assert "aarch64" in note
    assert "golden vectors; 50 samples" in note


def test_another_models_file_is_refused_there(release: Release, shared_data: Path, tmp_path: Path) -> None:
    folder = compiling.unpacked(release, "rpi4", tmp_path / "bundle")
    request = EmulationRequest(folder=str(folder), config=str(folder / "config.json"))
    assert proving.prove("cortex-a72", request).holds
    shutil.copyfile(shared_data / "models" / "ic_resnet8_int8.tflite", folder / "model.tflite")
    answer = proving.prove("cortex-a72", request)
    assert not answer.holds
    assert answer.machine == "aarch64"

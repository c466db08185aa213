"""A download of more than 32 MiB through five killed agents, a killed broker and a killed controller: no finished block
is served twice, and the device ends serving."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tests.support.brokers import Mosquitto
from tests.support.bundles import iter_hashes, make_bundle, samples
from tests.support.field import DEVICE, LEGACY, Device, Field, agent_of

from kedge.demo.processes import wait_until
from kedge.fleet.service import FleetService
from kedge_protocol import blocks
from kedge_protocol.bundle.layout import Layout

MIB = 36
WINDOW = 8
KILLS = 5
RATE_KIB = 2048


class Download:
    """The partial blob on the device's disk, as the test sees it from outside."""

    def __init__(self, device: Device, layout: Layout) -> None:
        bundle = layout.bundle(device.target)
        self.layer = max(bundle.manifest.layers, key=lambda layer: layer.size)
        self._hashes = list(iter_hashes(blocks.map_of_file(layout.blob_path(self.layer.digest))))
        self._hex = self.layer.digest.partition(":")[2]
        self._state = device.state

    @property
    def finished(self) -> int:
        """How many blocks on the disk have the right hash."""
        complete = self._state / "blobs" / "sha256" / self._hex
        if complete.exists():
            return len(self._hashes)
        partial = self._state / "partial" / self._hex
        try:
            file = partial.open("rb")
        except FileNotFoundError:  # it has not begun, or was finished meanwhile
            return len(self._hashes) if complete.exists() else 0
        with file:
            return sum(blocks.block_hash(file.read(blocks.BLOCK_SIZE)) == known for known in self._hashes)

    @property
    def share(self) -> float:
        """Of the blocks, 0..1."""
        return self.finished / len(self._hashes)

    def reach(self, share: float) -> None:
        """Wait until as much is on the disk."""
        wait_until(f"{share:.0%} of the download", lambda: self.share >= share, seconds=300, every=0.02)


@pytest.mark.shared_data
@pytest.mark.needs("mosquitto")
def test_a_download_survives_kills_of_agent_broker_and_controller(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    out = make_bundle(tmp_path, "big", target=("generic-cpu",), mebibytes=MIB)
    layout = Layout(out)
    assert layout.bundle("generic-cpu").model_bytes >= 32 << 20
    chance = random.Random(20261121)
    points = sorted(chance.uniform(0.2, 0.65) for _ in range(KILLS))
    with Field(tmp_path, mosquitto.url) as field:
        device = field.add("edge", "generic-cpu", agent_of(DEVICE), window=WINDOW, kib_per_second=RATE_KIB)
        field.publish(out)
        field.start_rollout("big:1.0")
        download = Download(device, layout)
        for point in points:
            download.reach(point)
            device.process.kill()
            assert download.share < 1.0, "the download ended before the kill: lower its rate"
            device.process.start()
        download.reach(min(0.72, download.share + 0.05))
        mosquitto.kill()
        assert download.share < 1.0
        mosquitto.start()
        download.reach(min(0.8, download.share + 0.05))
        field.controller.kill()
        assert download.share < 1.0
        field.controller.start()
        assert field.decided() == {"edge": "done"}, field.reasons()

        with FleetService(field.state) as service:
            transfers = {(t.digest, t.kind): t for t in service.transfers("edge")}
        counted = transfers[download.layer.digest, "blob"]
        total = blocks.block_count(download.layer.size)
        assert counted.finished_served_again == 0
        # The controller writes its count every half second, a busy one more seldom: its own SIGKILL may cost what it
        # served since.
        assert total - 4 * RATE_KIB // 64 - WINDOW <= counted.blocks_distinct <= total
        # What was under way at each of the seven interruptions may be sent again, and no more.
        assert counted.blocks_served <= total + (KILLS + 2) * WINDOW
        assert all(transfer.finished_served_again == 0 for transfer in transfers.values())

        inputs = samples(4)
        bare = _bare(layout, inputs)
        np.testing.assert_allclose(device.infer("big", "input", inputs), bare, rtol=1e-5, atol=1e-6)

        # The next version shares most of its blocks: those are taken from the disk.
        second = make_bundle(tmp_path, "big", "2.0", mebibytes=MIB, head_seed=1)
        field.publish(second)
        field.start_rollout("big:2.0")
        assert field.decided() == {"edge": "done"}, field.reasons()
        pulled = field.status().devices[0].bytes_sent
        assert pulled < 0.15 * Layout(second).bundle("generic-cpu").model_bytes


@pytest.mark.shared_data
@pytest.mark.needs("mosquitto")
def test_a_legacy_device_is_killed_too_and_ends_serving(
    shared_data: Path, tmp_path: Path, mosquitto: Mosquitto
) -> None:
    from tests.support.bundles import make_tflite_bundle

    data = np.load(shared_data / "eval" / "ic.npz")["input"]
    out = make_tflite_bundle(tmp_path, shared_data / "models" / "ic_resnet8_int8.tflite", data)
    layout = Layout(out)
    with Field(tmp_path, mosquitto.url) as field:
        device = field.add("old-pi", "rpi4", agent_of(LEGACY), window=1, kib_per_second=64)
        field.publish(out)
        field.start_rollout("tiny:1.0")
        download = Download(device, layout)
        download.reach(0.25)
        device.process.kill()
        device.process.start()
        assert field.decided() == {"old-pi": "done"}, field.reasons()
        assert field.shown("old-pi")["device"]["reported"]["runtimes"]["tflite-runtime"].startswith("2.14")
        with FleetService(field.state) as service:
            assert all(transfer.finished_served_again == 0 for transfer in service.transfers("old-pi"))


def _bare(layout: Layout, inputs: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    import onnxruntime

    bundle = layout.bundle("generic-cpu")
    path = layout.blob_path(bundle.files[bundle.config.entry].digest)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    result: np.ndarray = session.run(None, {"input": inputs})[0]  # type: ignore[type-arg]
    return result

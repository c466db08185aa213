"""``kedge-agent watch``: frames of folders and videos, as lines of JSON and over MQTT; dropped ones are counted."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paho.mqtt.client as paho
import pytest
from PIL import Image
from tests.support import raw_data, requirements
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.bundles import make_bundle
from tests.support.ports import free_port, listens
from tests.support.waiting import wait_for

import kedge
from kedge_agent import Model
from kedge_agent.watching.frames import open_source
from kedge_agent.watching.outputs import JsonLines
from kedge_agent.watching.watch import watch
from kedge_protocol.errors import InputError

__all__ = ["mosquitto"]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of colours."""
    folder = tmp_path_factory.mktemp("watched")
    pictures = raw_data.class_folders(folder / "data")
    kedge.compile(
        raw_data.colour_model(folder / "colours.onnx"), name="colours", version="1", targets=["generic-cpu"],
        calibration=pictures, evaluation=pictures, task="classification", out=folder / "OUT",
        quantize="precision=float32", max_drop=1.0,
    )  # fmt: skip
    return folder / "OUT"


def pictures_in(folder: Path, count: int, *, side: int = 48) -> list[int]:
    """Plain pictures in turns of the three colours; the numbers of the colours, in order."""
    folder.mkdir()
    for number in range(count):
        pixels = np.zeros((side, side, 3), np.uint8)
        pixels[..., number % 3] = 250
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    return [number % 3 for number in range(count)]


def records_of(release: Path, source: Any, **options: Any) -> tuple[list[dict[str, Any]], Any]:
    lines: list[str] = []
    with Model(release, target="generic-cpu") as model:
        summary = watch(model, source, JsonLines(lines.append), **options)
    return [json.loads(line) for line in lines], summary


def test_every_picture_of_a_folder_is_answered_and_a_damaged_one_is_named(release: Path, tmp_path: Path) -> None:
    colours = pictures_in(tmp_path / "in", 4)
    (tmp_path / "in" / "0002x.jpg").write_bytes(b"half a picture")
    (tmp_path / "in" / "notes.txt").write_text("no picture")
    records, summary = records_of(release, open_source(str(tmp_path / "in")))
    assert [record["frame"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["answer"][0]["index"] for record in records if "answer" in record] == colours
    assert records[3]["name"] == "0002x.jpg"
    assert "is no picture: neither JPEG" in records[3]["error"]
    assert {record.get("version") for record in records} == {"1", None}
    assert str(summary) == "4 frames answered, 0 dropped, 1 unreadable"


def test_frames_are_dropped_and_counted_where_the_model_is_slower(release: Path, tmp_path: Path) -> None:
    pictures_in(tmp_path / "in", 30, side=700)
    records, summary = records_of(release, open_source(str(tmp_path / "in")), fps=1000.0)
    assert summary.dropped > 0
    assert summary.answered + summary.dropped == 30
    assert sum(record["dropped"] for record in records) == summary.dropped
    assert records[-1]["frame"] == 29  # what is answered is the latest
    numbers = [record["frame"] for record in records]
    assert numbers == sorted(set(numbers))
    # The numbers that are missing before a record are those that it says were dropped.
    assert [b - a - 1 for a, b in zip([-1, *numbers], numbers)] == [record["dropped"] for record in records]  # noqa: B905


def test_a_folder_is_followed_until_it_is_enough(release: Path, tmp_path: Path) -> None:
    pictures_in(tmp_path / "in", 1)
    stop = threading.Event()
    lines: list[str] = []
    with Model(release, target="generic-cpu") as model:
        source = open_source(str(tmp_path / "in"), follow=True)
        thread = threading.Thread(target=watch, args=(model, source, JsonLines(lines.append)), kwargs={"stop": stop})
        thread.start()
        wait_for(lambda: len(lines) == 1)
        Image.new("RGB", (8, 8), (0, 0, 255)).save(tmp_path / "in" / "new.png")
        wait_for(lambda: len(lines) == 2)
        stop.set()
        thread.join(60)
    assert not thread.is_alive()
    assert json.loads(lines[1])["name"] == "new.png"


def test_every_frame_of_a_video(release: Path, tmp_path: Path) -> None:
    requirements.package("av")
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        for number in range(6):
            pixels = np.zeros((64, 64, 3), np.uint8)
            pixels[..., number // 2] = 250
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    records, _ = records_of(release, open_source(str(tmp_path / "a.mp4")), fps=0)
    assert [record["answer"][0]["index"] for record in records] == [0, 0, 1, 1, 2, 2]
    began = time.monotonic()
    records, summary = records_of(release, open_source(str(tmp_path / "a.mp4")))
    assert time.monotonic() - began >= 0.5  # at the video's own pace
    assert summary.answered + summary.dropped == 6
    (tmp_path / "b.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="cannot be opened"):
        open_source(str(tmp_path / "b.mp4"))


_SERVER = """
import asyncio, sys
import aio_rtsp_toolkit.server as rtsp
asyncio.run(rtsp.serve(sys.argv[1], "127.0.0.1", int(sys.argv[2]), control_port=int(sys.argv[3])))
"""


@contextlib.contextmanager
def rtsp_server(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Serves a folder's videos; they start again from the beginning for each client, in their own pace."""
    process = subprocess.Popen([sys.executable, "-c", _SERVER, str(folder), str(port), str(free_port())],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or listens(port), what="the server of videos")
        yield process
    finally:
        process.kill()
        process.wait()


def test_frames_of_a_network_camera(release: Path, tmp_path: Path) -> None:
    requirements.package("av")
    requirements.package("aio_rtsp_toolkit")
    import av

    folder = tmp_path / "videos"
    folder.mkdir()
    with av.open(str(folder / "colours.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"g": "5", "bf": "0", "tune": "zerolatency"})
        stream.width = stream.height = 96
        stream.pix_fmt = "yuv420p"
        for number in range(1200):
            pixels = np.zeros((96, 96, 3), np.uint8)
            pixels[..., number // 5 % 3] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    port = free_port()
    address = f"rtsp://127.0.0.1:{port}/colours.mp4"
    command = [sys.executable, "-m", "kedge_agent.cli", "watch", str(release), "--target", "generic-cpu", "--source"]
    with rtsp_server(folder, port) as server:
        watching = subprocess.Popen([*command, address], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert watching.stdout is not None
            records = [json.loads(watching.stdout.readline()) for _ in range(12)]
            server.kill()  # a camera whose cable is pulled
            _, said = watching.communicate(timeout=300)
        finally:
            watching.kill()
            watching.wait()
    numbers = [record["frame"] for record in records]
    assert numbers == sorted(numbers)
    for record in records:
        assert record["answer"][0]["index"] == record["frame"] // 5 % 3
    assert "frames" in said, "the last line says how many there were"
    gone = subprocess.run([*command, address], capture_output=True, text=True, timeout=300, check=False)
    assert gone.returncode == 1
    assert "cannot be opened" in gone.stderr


def test_a_device_that_is_no_camera_is_named_with_the_systems_words() -> None:
    # Another reader than that of cameras would find an empty file.
    with pytest.raises(InputError, match=r"/dev/null: cannot be opened: .*Inappropriate ioctl"):
        open_source("/dev/null")
    with pytest.raises(InputError, match="no such folder, file or device"):
        open_source("/dev/video99")


def test_sources_that_are_none_and_models_without_pictures(release: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder, file or device"):
        open_source(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no picture"):
        records_of(release, open_source(str(tmp_path / "empty")))
    with pytest.raises(InputError, match="takes no pictures"):
        records_of(make_bundle(tmp_path), open_source(str(tmp_path / "empty")))


def test_the_command_publishes_over_mqtt(release: Path, tmp_path: Path, mosquitto: Mosquitto) -> None:
    colours = pictures_in(tmp_path / "in", 3)
    heard: list[tuple[str, Any]] = []
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.on_message = lambda _, __, message: heard.append((message.topic, json.loads(message.payload)))
    client.connect("127.0.0.1", mosquitto.port)
    client.subscribe("kedge-watch/#")
    client.loop_start()
    try:
        command = [sys.executable, "-m", "kedge_agent.cli", "watch", str(release), "--target", "generic-cpu"]
        command += ["--source", str(tmp_path / "in"), "--out", "mqtt", "--broker", mosquitto.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert "3 frames answered, 0 dropped" in done.stderr
        wait_for(lambda: len(heard) == 5)
    finally:
        client.loop_stop()
        client.disconnect()
    assert [one["online"] for topic, one in heard if topic.endswith("/status")] == [True, False]
    answers = [one for topic, one in heard if topic == "kedge-watch/colours"]
    assert [one["answer"][0]["index"] for one in answers] == colours

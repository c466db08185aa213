"""The fleet's way to programmable logic: a bundle for a PYNQ-Z2 is published, pulled over MQTT by an agent with FINN's
own driver on a stand-in for the board, proved there bit for bit, served, and its throughput told; what the fabric
computes otherwise is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support import fabric
from tests.support.brokers import Mosquitto
from tests.support.field import DEVICE, Device, Field, agent_of

from kedge.demo.processes import wait_until
from kedge_protocol.bundle.layout import Layout
from kedge_targets.backends.finn import board
from kedge_targets.backends.finn.simulator import Simulator

TARGET = "pynq-z2"
pytestmark = pytest.mark.needs("mosquitto")


def on_board(folder: Path) -> dict[str, str]:
    """The environment of an agent on the stand-in for a board."""
    return {
        "PYTHONPATH": str(fabric.FAKE),
        "FAKE_PYNQ_LOG": str(folder / "pynq.log"),
        "FAKE_PYNQ_STATE": str(folder / "in-fabric"),
        board.LOCK: str(folder / "fabric.lock"),
    }


def without_tools(folder: Path) -> dict[str, str]:
    """The environment of an agent with no toolchain, no PYNQ and nothing of the host."""
    empty = folder / "nothing"
    empty.mkdir()
    return {"HOME": str(empty), "XDG_DATA_HOME": str(empty), "PATH": str(empty), "PYTHONPATH": ""}


def answers(device: Device, raw: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
    return device.infer("small", "image", raw)


def test_a_bitfile_is_pulled_proved_on_the_board_served_and_measured(tmp_path: Path, mosquitto: Mosquitto) -> None:
    graph = fabric.convolutional()
    good = fabric.release(tmp_path / "good", bitstream_of=graph)
    # The same network by its files, another one in the bitfile: only the board can tell.
    bad = fabric.release(tmp_path / "bad", version="2.0", bitstream_of=fabric.convolutional(flipped=True))
    raw = fabric.images(20, seed=3)
    expected = Simulator(graph).run([raw])[0]
    with Field(tmp_path, mosquitto.url) as field:
        device = field.add("pynq", TARGET, agent_of(DEVICE), env=on_board(tmp_path))
        field.publish(good)
        field.start_rollout("small:1.0", "site=test")
        assert set(field.decided().values()) == {"done"}, field.reasons()

        did = (tmp_path / "pynq.log").read_text().splitlines()
        assert any(line.startswith("download") for line in did)
        assert "run 256" in did, "FINN's throughput test"
        np.testing.assert_array_equal(answers(device, raw), expected)
        assert (tmp_path / "pynq.log").read_text().splitlines().count("run 1") >= len(raw)

        reported = field.shown("pynq")["device"]["reported"]["models"]["small"]
        assert reported["digest"] == Layout(good).bundle(TARGET).digest
        assert "FINN accelerator on Pynq-Z2 at 125 MHz" in reported["detail"]
        telemetry = wait_until(
            "telemetry of the calls",
            lambda: [
                seen["models"]["small"]
                for seen in field.shown("pynq")["telemetry"]
                if seen["models"].get("small", {}).get("inferences_total", 0) >= len(raw)
            ],
            seconds=120,
        )
        assert telemetry[-1]["errors_total"] == 0
        assert telemetry[-1]["figures"]["samples_per_second"] > 0
        assert telemetry[-1]["figures"]["clock_mhz"] == 125.0
        assert "samples_per_second" in field.kedge("device", "show", "pynq")

        field.publish(bad)
        field.start_rollout("small:2.0")
        assert set(field.decided().values()) == {"failed"}
        reported = field.shown("pynq")["device"]["reported"]["models"]["small"]
        assert reported["digest"] == Layout(good).bundle(TARGET).digest
        assert reported["failure"]["stage"] == "prove"
        assert "golden vectors do not hold" in reported["failure"]["reason"]
        np.testing.assert_array_equal(answers(device, raw), expected)


@pytest.mark.parametrize("bitfile", [False, True], ids=["without a bitfile", "with a bitfile and no board"])
def test_without_a_board_or_any_toolchain_it_is_simulated_bit_for_bit_and_says_so(
    tmp_path: Path, mosquitto: Mosquitto, bitfile: bool
) -> None:
    graph = fabric.convolutional()
    release = fabric.release(tmp_path / "made", bitstream_of=graph if bitfile else None)
    raw = fabric.images(20, seed=3)
    with Field(tmp_path, mosquitto.url) as field:
        device = field.add("bare", TARGET, agent_of(DEVICE), env=without_tools(tmp_path))
        field.publish(release)
        field.start_rollout("small:1.0", "site=test")
        assert set(field.decided().values()) == {"done"}, field.reasons()
        np.testing.assert_array_equal(answers(device, raw), Simulator(graph).run([raw])[0])
        shown = field.shown("bare")
        assert "simulated bit for bit in numpy" in shown["device"]["reported"]["models"]["small"]["detail"]
        assert "simulated bit for bit in numpy" in field.kedge("device", "show", "bare")

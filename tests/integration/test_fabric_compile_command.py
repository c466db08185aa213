"""``kedge compile`` for programmable logic, as a user runs it: FINN's published networks to the last image, estimates
for two boards, a float network through the search, and every refusal with its node and remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from tests.support import few_bits, toolchains
from tests.support.compiling import kedge
from tests.support.small_networks import Trained, digits_network

from kedge_agent.model import Model
from kedge_protocol.bundle.layout import Layout

BOARDS = ("pynq-z2", "zcu104")


@pytest.fixture(scope="module", autouse=True)
def _toolchain() -> None:
    toolchains.required("finn")


def compiled(model: Path, folder: Path, *more: str, targets: Sequence[str] = ("pynq-z2",)) -> CompletedProcess[str]:
    """With ``calibration.npz`` and ``evaluation.npz`` of the folder, into ``OUT``."""
    named = [part for target in targets for part in ("--target", target)]
    data = ["--calibration", str(folder / "calibration.npz"), "--evaluation", str(folder / "evaluation.npz")]
    line = ["compile", str(model), "--name", "small", "--version", "1.0", *named, *data]
    return kedge([*line, "--out", str(folder / "OUT"), *more])


def report_of(folder: Path, out: str = "OUT") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / out / "report.json").read_text())
    return found


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "precision", "correct"),
    [pytest.param("tfc_1w1a", "w1a1", 9296, marks=pytest.mark.campaign), ("tfc_1w2a", "w1a2", 9474)],
)
def test_published_networks_to_the_last_image_with_estimates_for_two_boards(
    shared_data: Path, tmp_path: Path, name: str, precision: str, correct: int
) -> None:
    with np.load(shared_data / "eval" / "mnist_t10k_uint8.npz") as arrays:
        images, label = arrays["input"], arrays["label"]
    # Nothing is calibrated in a network that is quantized already: noise will do.
    np.savez(tmp_path / "calibration.npz", input=np.random.default_rng(0).integers(0, 256, (4, 1, 28, 28), np.uint8))
    np.savez(tmp_path / "evaluation.npz", input=images, label=label)
    model = shared_data / "models" / f"{name}_qonnx.onnx"
    done = compiled(model, tmp_path, "--preprocess", "scale=1/255", targets=BOARDS)
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path)
    html = (tmp_path / "OUT" / "report.html").read_text()
    layout = Layout(tmp_path / "OUT")
    for entry in report["bundles"]:
        assert (entry["target"] in BOARDS, entry["precision"], entry["verified"]) == (True, precision, "simulated")
        assert entry["value"] == correct / 10_000
        assert entry["evaluation_samples"] == 10_000
        assert entry["drop"] == 0
        estimate = entry["estimate"]
        assert estimate["frames_per_second"] > 10_000
        for resource, there_are in estimate["capacity"].items():
            assert sum(layer["resources"].get(resource, 0) for layer in estimate["layers"]) <= there_are
        assert sum(layer["resources"].get("LUT", 0) for layer in estimate["layers"]) > 1000
        assert len(estimate["layers"]) >= 4
        assert all(layer["cycles"] > 0 for layer in estimate["layers"] if layer["cycles"] is not None)
        assert estimate["layers"][0]["name"] in html
        bundle = layout.bundle(entry["target"])
        assert bundle.config.verified.value == "simulated"
        assert bundle.config.precision == precision
        titles = set(bundle.files)
        # QONNX, the streamlined graph, its folding, the build for a host with Vivado, the estimates, golden integers.
        assert titles >= {
            "model.onnx",
            "streamlined.onnx",
            "graph.json",
            "folding.json",
            "build.sh",
            "build.yaml",
            "golden.npz",
        }
        assert titles >= {"estimate_layer_cycles.json", "estimate_layer_resources.json", "settings.json"}
    capacities = {entry["target"]: entry["estimate"]["capacity"]["LUT"] for entry in report["bundles"]}
    assert capacities["zcu104"] > capacities["pynq-z2"]
    with Model(tmp_path / "OUT", target="pynq-z2") as runtime:
        assert "simulated bit for bit" in runtime.detail
        right = 0
        for start in range(0, len(images), 1000):
            answers = runtime(images[start : start + 1000])
            assert isinstance(answers, np.ndarray)
            right += int((answers.reshape(len(answers), -1).argmax(axis=1) == label[start : start + 1000]).sum())
    assert right == correct


def random_data(folder: Path, size: int = 8) -> None:
    rng = np.random.default_rng(1)
    np.savez(folder / "calibration.npz", image=rng.random((16, 1, size, size), dtype=np.float32))
    np.savez(folder / "evaluation.npz", image=rng.random((16, 1, size, size), dtype=np.float32))


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        pytest.param(few_bits.network(residual=True), (), ("pool", "branch", "skip"), id="residual"),
        pytest.param(few_bits.network(softmax=True), (), ("Softmax", "'softmax'"), id="unsupported layer"),
        pytest.param(few_bits.network(quantized_input=False), (), ("'first'", "Quant"), id="an input outside"),
        pytest.param(few_bits.network(), ("--target-fps", "1e9"), ("layer '", "Ask for at most"), id="unreachable fps"),
        pytest.param(
            few_bits.network(), ("--max-utilization", "0.001"), ("layer '", "Take a larger board"), id="board too small"
        ),
    ],
)
def test_what_cannot_be_is_refused_with_its_node_and_a_remedy(
    tmp_path: Path, model: onnx.ModelProto, more: tuple[str, ...], words: tuple[str, ...]
) -> None:
    random_data(tmp_path)
    done = compiled(few_bits.saved(model, tmp_path / "model.onnx"), tmp_path, *more)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert not (tmp_path / "OUT").exists()


def test_without_the_toolchain_it_says_what_is_missing_and_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random_data(tmp_path)
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "empty"))
    done = compiled(few_bits.saved(few_bits.network(), tmp_path / "model.onnx"), tmp_path)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    assert "kedge toolchain install finn" in said
    assert "Traceback" not in said


def test_a_bitfile_goes_with_its_driver_settings(tmp_path: Path) -> None:
    random_data(tmp_path)
    bit = tmp_path / "finn-accel.bit"
    bit.write_bytes(b"bits")
    bit.with_suffix(".hwh").write_text("<xml/>")
    model = few_bits.saved(few_bits.network(), tmp_path / "model.onnx")
    done = compiled(model, tmp_path, "--bitfile", str(bit))
    assert done.returncode == 0, done.stdout + done.stderr
    bundle = Layout(tmp_path / "OUT").bundle("pynq-z2")
    assert {"finn-accel.bit", "finn-accel.hwh", "settings.json"} <= set(bundle.files)
    assert bundle.config.runtime_options["bitfile"] == "finn-accel.bit"
    # No board has run it yet.
    assert bundle.config.verified.value == "simulated"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("digits")
    trained = digits_network(folder, None)
    np.savez(folder / "calibration.npz", image=trained.train, label=trained.train_label)
    np.savez(folder / "evaluation.npz", image=trained.held_out, label=trained.held_out_label)
    return trained, folder


def test_a_float_network_gets_four_bits_by_itself(digits: tuple[Trained, Path]) -> None:
    trained, folder = digits
    done = compiled(trained.graph, folder, "--max-drop", "0.01", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = report_of(folder)["bundles"]
    assert entry["precision"] == "w4a4"
    assert entry["drop"] <= 0.01
    assert entry["steps"] == []


def test_two_bits_are_fine_tuned_by_one_option(digits: tuple[Trained, Path]) -> None:
    trained, folder = digits
    tune = ("--quantize", "precision=w2a2,range_method=mse", "--step", "fine-tune:steps=1500,batch=64")
    # How near it comes is shown in test_finn_accuracy.py.
    done = compiled(trained.graph, folder, *tune, "--max-drop", "0.05", "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    (entry,) = report_of(folder)["bundles"]
    assert entry["precision"] == "w2a2"
    assert entry["drop"] <= 0.05
    assert [step["use"] for step in entry["steps"]] == ["fine-tune"]


def test_fewer_bits_where_the_board_has_no_room_for_four(digits: tuple[Trained, Path]) -> None:
    trained, folder = digits
    wanted = ("--target-fps", "90000", "--max-utilization", "0.1", "--max-drop", "0.04")
    done = compiled(trained.graph, folder, *wanted, "--force")
    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(folder)
    (entry,) = report["bundles"]
    assert entry["precision"] in ("w3a3", "w2a2")
    assert entry["drop"] <= 0.04
    assert entry["estimate"]["frames_per_second"] >= 90_000
    refused = next(attempt for attempt in entry["attempts"] if attempt["precision"] == "w4a4")
    assert "90000 frames a second takes" in refused["reason"], refused

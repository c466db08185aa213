"""``kedge compile`` for a Jetson: the whole way on a host without a GPU, where ONNX Runtime stands in."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.compiling import kedge

from kedge_protocol.bundle.layout import Layout
from kedge_targets.backends.tensorrt import recipe
from kedge_targets.proof import ProveAnswer, ProveRequest, prove

pytestmark = [pytest.mark.shared_data, pytest.mark.usefixtures("tensorrt_toolchain")]

TARGET = "jetson-orin-nano"


def test_a_bundle_for_a_jetson_says_how_far_it_was_proved_and_holds_on_both_kernel_sets(
    shared_data: Path, tmp_path: Path
) -> None:
    with np.load(shared_data / "eval" / "kws.npz") as data:
        raw, label = data["input"], data["label"]
    np.savez(tmp_path / "calibration.npz", input=raw[:200])
    np.savez(tmp_path / "evaluation.npz", input=raw[200:], label=label[200:])
    out = tmp_path / "OUT"
    done = kedge(
        [
            "compile", str(shared_data / "models" / "kws_dscnn.onnx"), "--name", "kws", "--version", "1.0",
            "--target", TARGET, "--calibration", str(tmp_path / "calibration.npz"),
            "--evaluation", str(tmp_path / "evaluation.npz"), "--max-drop", "0.01", "--out", str(out),
        ]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    layout = Layout(out)
    bundle = layout.bundle(TARGET)
    config = bundle.config
    assert (config.backend, config.precision, config.entry) == ("tensorrt", "int8", recipe.ENTRY)
    assert config.verified.value == "checked"
    assert config.golden.kernel_sets == ("int8", "fp16", "coarse")
    assert config.metric.reference - config.metric.value <= 0.01
    assert {need.distribution for need in config.runtimes} == {"tensorrt", "onnxruntime", "onnxruntime-gpu"}
    assert set(bundle.files) == {*recipe.FILES.values(), recipe.ENTRY, config.golden.file}
    folder = tmp_path / "slot"
    folder.mkdir()
    for title, layer in bundle.files.items():
        (folder / title).write_bytes(layout.blob_path(layer.digest).read_bytes())
    (folder / "config.json").write_bytes(bundle.config_raw)
    assert recipe.read(folder / recipe.ENTRY).precisions == ("int8", "fp16")
    for kernel_set in ("int8", "fp16"):
        assert proved(folder, kernel_set).holds
    # A damaged graph does not hold: the tolerance of two precisions still tells it.
    graph = folder / recipe.FILES["int8"]
    graph.write_bytes((folder / recipe.FILES["fp16"]).read_bytes())
    import onnx

    model = onnx.load_model(str(graph))
    largest = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    largest.raw_data = bytes(len(largest.raw_data))
    onnx.save_model(model, str(graph))
    assert not proved(folder, "int8").holds


def proved(folder: Path, kernel_set: str) -> ProveAnswer:
    request = ProveRequest(folder=str(folder), config=str(folder / "config.json"), kernel_set=kernel_set)
    return prove(request, lambda what, done, total: None)

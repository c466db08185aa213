"""A cascade of two real classifiers: a linear model on the device and a convolutional network behind an address of the
Open Inference Protocol, on MNIST's test images. What the report promises of both together comes true on others."""

from __future__ import annotations

import http.client
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from tests.support.ports import free_port
from tests.support.standalone import Served, serving

import kedge

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(1800)]

Array = npt.NDArray[Any]

TRAINED, JUDGED, FRESH = 5000, 2000, 3000
SHARE, DEADLINE_MS = 0.1, 500
PICTURE = (
    '[picture]\nwidth = 28\nheight = 28\nfit = "stretch"\ncolour = "grey"\n[scores]\nactivation = "softmax"\ntop = 1\n'
)
LARGE = f'task = "classification"\n[normalize]\nscale = 1.0\nmean = 0.0\nstd = 1.0\n{PICTURE}'
SMALL = f'task = "classification"\n[normalize]\nscale = "1/255"\nmean = 0.0\nstd = 1.0\n{PICTURE}'


def linear(pixels: Array, labels: Array, path: Path) -> Path:
    """Softmax regression on raw pixels, trained here."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float32) / 255
    wanted = np.eye(10, dtype=np.float32)[labels]
    weights, bias = np.zeros((784, 10), np.float32), np.zeros(10, np.float32)
    rng = np.random.default_rng(3)
    for step in range(3000):
        rows = rng.integers(0, len(flat), 128)
        logits = flat[rows] @ weights + bias
        found = np.exp(logits - logits.max(1, keepdims=True))
        error = found / found.sum(1, keepdims=True) - wanted[rows]
        rate = 0.3 / (1 + step / 1000) / len(rows)
        weights -= rate * (flat[rows].T @ error)
        bias -= rate * error.sum(0)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["image"], ["flat"]), helper.make_node("Gemm", ["flat", "w", "b"], ["logits"])],
        "linear",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(bias, "b")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[0]).save(buffer, "PNG")
    return buffer.getvalue()


def asked(served: Served, pictures: Array) -> tuple[Array, Array, Array]:
    """Digits, whether the larger model gave them, and milliseconds."""
    link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
    digits, larger, taken = [], [], []
    for pixels in pictures:
        body = png(pixels)
        begun = time.perf_counter()
        link.request("POST", "/v2/models/small/pipeline", body, {"Content-Type": "image/png"})
        answer = json.loads(link.getresponse().read())
        taken.append((time.perf_counter() - begun) * 1000)
        digits.append(answer["answer"][0]["index"])
        larger.append(answer["answered_by"]["model_name"] == "large")
    link.close()
    return np.array(digits), np.array(larger), np.array(taken)


def test_two_real_models_together_are_as_good_as_the_report_says(tmp_path: Path, shared_data: Path) -> None:
    with np.load(shared_data / "eval" / "mnist_t10k_uint8.npz") as data:
        pixels, labels = data["input"], data["label"]
    order = np.random.default_rng(5).permutation(len(pixels))
    train, judge, fresh = np.split(order, [TRAINED, TRAINED + JUDGED])
    port = free_port()
    (tmp_path / "large.toml").write_text(LARGE)
    cascade = (
        f'[cascade]\nurl = "http://127.0.0.1:{port}"\nmodel = "large"\nshare = {SHARE}\ndeadline_ms = {DEADLINE_MS}\n'
    )
    (tmp_path / "small.toml").write_text(SMALL + cascade)
    for digit in range(10):
        (tmp_path / "digits" / str(digit)).mkdir(parents=True)
    for number in judge:
        (tmp_path / "digits" / str(labels[number]) / f"{number}.png").write_bytes(png(pixels[number]))

    def compiled(name: str, model: Path) -> Path:
        kedge.compile(
            model, name=name, version="1", targets=["generic-cpu"], calibration=tmp_path / "digits",
            evaluation=tmp_path / "digits", pipeline=tmp_path / f"{name}.toml", out=tmp_path / name, effort="quick",
        )  # fmt: skip
        return tmp_path / name

    large = compiled("large", shared_data / "models" / "mnist_cnn.onnx")
    with serving(str(large), "--listen", f"127.0.0.1:{port}", proof=True) as cloud:
        cloud.wait()
        small = compiled("small", linear(pixels[train], labels[train], tmp_path / "linear.onnx"))
        told = json.loads((small / "report.json").read_text())["bundles"][0]["cascade"]
        with serving(str(small), "--listen", "127.0.0.1:0", proof=True) as device:
            device.wait()
            digits, larger, taken = asked(device, pixels[fresh])
    right = digits == labels[fresh]
    print(
        f"\nreport: device {told['device_accuracy']:.4f}, larger {told['larger_accuracy']:.4f}, "
        f"together {told['accuracy']:.4f}, share {told['share']:.4f}, ms {told['device_ms']} {told['together_ms']}"
        f"\n{len(fresh)} fresh images over HTTP: {right.mean():.4f}, share {larger.mean():.4f}, "
        f"device's own median {np.median(taken[~larger]):.2f} ms, escalated {np.median(taken[larger]):.2f} ms "
        f"(p95 {np.percentile(taken[larger], 95):.2f})"
    )
    assert told["larger_accuracy"] > 0.98 > told["accuracy"] > told["device_accuracy"] + 0.03
    # Twice the standard error of a share of so many.
    assert abs(right.mean() - told["accuracy"]) < 2 * np.sqrt(0.06 * 0.94 * (1 / JUDGED + 1 / FRESH)) + 0.005
    assert 0.05 < larger.mean() <= SHARE + 20 / FRESH

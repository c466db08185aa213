"""A camera's session: the blob of so many SHAVEs, arrays by name, and the CPU in its place, said aloud."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.support import fake_depthai as fake

from kedge_protocol.errors import ConfigError, InputError, MissingDependencyError, VerificationError
from kedge_targets.backends.myriad import representation
from kedge_targets.backends.myriad.runtime import Runtime
from kedge_targets.backends.openvino import library

OPTIONS = {
    "device": "oak",
    "shaves": 6,
    "inputs": ["b", "a"],
    "outputs": [["total", [1, 3], "float32"], ["product", [1, 3], "float32"]],
}


def firmware(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"total": inputs["a"] + inputs["b"], "product": inputs["a"] * inputs["b"]}


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The files of a bundle with two inputs and two outputs; the blobs hold them in another order than the model."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "b"], ["total"]), helper.make_node("Mul", ["a", "b"], ["product"])],
        "two",
        [value("a", TensorProto.FLOAT, [1, 3]), value("b", TensorProto.FLOAT, [1, 3])],
        [value("product", TensorProto.FLOAT, [1, 3]), value("total", TensorProto.FLOAT, [1, 3])],
    )
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    read = library.load().Core().read_model(model.SerializeToString())
    files = representation.save(read, tmp_path, names={"a", "b", "total", "product"})
    for shaves in (4, 6, 8):
        fake.blob(
            tmp_path / f"model-{shaves}.blob",
            shaves,
            {"a": ([3, 1], "FP16"), "b": ([3, 1], "FP16")},
            {"product": ([3, 1], "FP16"), "total": ([3, 1], "FP16")},
        )
    return files["model.xml"]


@pytest.fixture
def depthai(monkeypatch: pytest.MonkeyPatch) -> Any:
    """depthai with one camera."""
    monkeypatch.setitem(sys.modules, "depthai", fake)
    monkeypatch.setattr(fake.Device, "connected", [fake.DeviceInfo(fake.XLinkPlatform.X_LINK_MYRIAD_X)])
    monkeypatch.setattr(fake.Device, "firmware", staticmethod(firmware))
    monkeypatch.setattr(fake.Device, "opened", [])
    return fake


A = np.array([[1.0, 2.0, 3.0]], np.float32)
B = np.array([[0.5, 0.1, -4.0]], np.float32)


def check(session: Any) -> None:
    total, product = session.run([B, A])
    np.testing.assert_allclose(total, A + B, rtol=1e-2)
    np.testing.assert_allclose(product, A * B, rtol=1e-2)
    assert total.dtype == product.dtype == np.float32


@pytest.mark.parametrize("shaves", [4, 6, 8])
def test_the_blob_of_so_many_shaves_runs_on_the_camera(entry: Path, depthai: Any, shaves: int) -> None:
    session = Runtime().load(entry, {**OPTIONS, "shaves": shaves})
    check(session)
    assert session.detail == f"OAK-D, {shaves} SHAVEs"
    pipeline = depthai.Device.opened[0].pipeline
    assert pipeline.network.path == entry.with_name(f"model-{shaves}.blob")
    assert pipeline.network.threads == 1
    session.close()
    assert depthai.Device.opened[0].closed
    assert not pipeline.running


def test_a_kernel_set_leaves_the_camera_alone(entry: Path, depthai: Any) -> None:
    for name in Runtime().kernel_sets:
        check(Runtime().load(entry, OPTIONS, kernel_set=name))
    assert depthai.Device.opened == []


@pytest.mark.parametrize(
    ("connected", "told"),
    [
        ([], "no camera with a Myriad X is connected"),
        ([fake.DeviceInfo(fake.XLinkPlatform.X_LINK_RVC4)], "no camera with a Myriad X is connected"),
        ([fake.DeviceInfo(fake.XLinkPlatform.X_LINK_MYRIAD_X, busy=True)], "X_LINK_DEVICE_ALREADY_IN_USE"),
    ],
)
def test_without_a_camera_the_cpu_runs_it_and_says_so(
    entry: Path,
    depthai: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    connected: list[fake.DeviceInfo],
    told: str,
) -> None:
    monkeypatch.setattr(depthai.Device, "connected", connected)
    with caplog.at_level(logging.WARNING):
        session = Runtime().load(entry, OPTIONS)
    check(session)
    assert "CPU" in session.detail
    assert told in session.detail
    assert told in caplog.text


def test_the_second_camera_serves_where_the_first_is_held(
    entry: Path, depthai: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = fake.DeviceInfo(fake.XLinkPlatform.X_LINK_MYRIAD_X)
    held = fake.DeviceInfo(fake.XLinkPlatform.X_LINK_MYRIAD_X, busy=True)
    monkeypatch.setattr(depthai.Device, "connected", [held, free])
    assert Runtime().load(entry, OPTIONS).detail.startswith("OAK-D")


@pytest.mark.parametrize("device", ["oak", "ncs2"])
def test_without_the_devices_library_the_cpu_runs_it_and_says_so(
    entry: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setitem(sys.modules, "depthai", None)
    session = Runtime().load(entry, {**OPTIONS, "device": device})
    check(session)
    assert f"instead of {device}" in session.detail
    assert ("Neural Compute Stick" if device == "ncs2" else "depthai") in session.detail


def test_without_any_library_the_camera_is_what_is_missing(entry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "depthai", None)
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match="depthai"):
        Runtime().load(entry, OPTIONS)


def test_a_damaged_or_missing_blob_is_refused_not_replaced(entry: Path, depthai: Any) -> None:
    path = entry.with_name("model-6.blob")
    path.write_text("{}")
    with pytest.raises(VerificationError, match=r"model-6\.blob"):
        Runtime().load(entry, OPTIONS)
    path.unlink()
    with pytest.raises(VerificationError, match=r"model-6\.blob"):
        Runtime().load(entry, OPTIONS)
    fake.blob(path, 6, {"other": ([3, 1], "FP16")}, {"total": ([3, 1], "FP16")})
    with pytest.raises(VerificationError, match="other"):
        Runtime().load(entry, OPTIONS)


def test_a_camera_that_says_nothing_is_told_and_let_go(
    entry: Path, depthai: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Runtime().load(entry, OPTIONS)
    monkeypatch.setattr(depthai.Device, "firmware", staticmethod(lambda inputs: None))
    with pytest.raises(VerificationError, match="no answer within"):
        session.run([B, A])
    assert depthai.Device.opened[0].closed


def test_a_camera_that_is_unplugged_is_told(entry: Path, depthai: Any) -> None:
    session = Runtime().load(entry, OPTIONS)
    check(session)
    depthai.Device.opened[0].close()
    with pytest.raises(VerificationError, match="is gone"):
        session.run([B, A])


def test_arrays_that_do_not_fit_are_the_callers_error(entry: Path, depthai: Any) -> None:
    session = Runtime().load(entry, OPTIONS)
    with pytest.raises(InputError):
        session.run([A])
    with pytest.raises(InputError, match="cannot send"):
        session.run([np.zeros((1, 1, 1, 1, 3), np.float32), A])
    check(session)


@pytest.mark.parametrize(
    "wrong",
    [{"device": "hddl"}, {"shaves": 5}, {"shaves": True}, {"spin": 1}, {"inputs": None}, {"outputs": [["total"]]}],
)
def test_options_that_are_none(entry: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Runtime().load(entry, {**OPTIONS, **wrong})


def test_a_damaged_representation_is_refused(entry: Path) -> None:
    entry.write_bytes(entry.read_bytes()[:200])
    with pytest.raises(VerificationError, match=r"model\.xml"):
        Runtime().load(entry, {**OPTIONS, "device": "ncs2"})

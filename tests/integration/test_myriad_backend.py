"""The myriad backend with its real toolchain: blobs, what is refused before compiling, what the vendor's own library
says of them."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.support import fake_depthai, toolchains
from tests.support.lowering import (
    Calibration,
    checked_copy,
    classifier,
    content,
    executor,
    float_answers,
    images,
    lower,
)

from kedge_protocol.bundle.config import Verified
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import LoweringError, TargetError, UnsupportedOperatorError
from kedge_targets import registry, target
from kedge_targets.backends.myriad import camera, environment, wire
from kedge_targets.contract import Lowered
from kedge_targets.numerics import Plan, Precision
from kedge_targets.toolchain import Toolchain, declaration

TARGETS = ("oak-d", "oak-d-lite", "ncs2")
SHAVES = (4, 6, 8)


@pytest.fixture(scope="module")
def installed() -> Toolchain:
    return toolchains.required("myriad")


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(classifier().SerializeToString())
    return checked_copy(path, tmp_path)


def lowered(graph: Path, folder: Path, *, target_name: str = "oak-d", **options: Any) -> Lowered:
    return lower(target_name, graph, Precision.FLOAT16, Calibration("image", images(1)), folder, **options)


def asked(installed: Toolchain, script: str, *arguments: str) -> Any:
    """What a script says in the toolchain's environment, where the real depthai is."""
    command = [str(installed.python), "-c", script, *arguments]
    with tempfile.TemporaryDirectory() as home:  # it makes a folder there, whatever it is told
        env = {"HOME": home, **environment}
        ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True, env=env)
    return json.loads(ran.stdout.splitlines()[-1])


PARSE = """
import depthai, json, sys
found = {}
for path in sys.argv[1:]:
    blob = depthai.OpenVINO.Blob(path)
    found[path] = [blob.numShaves, blob.numSlices, blob.stageCount, sorted(blob.networkInputs),
                   sorted(blob.networkOutputs), [info.dataType.name for info in blob.networkInputs.values()]]
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Network:
    model: str
    evaluation: str
    input: str
    calibrate: int


NETWORKS = {
    "ic_resnet8": Network("ic_resnet8.onnx", "ic.npz", "input", 50),
    "kws_dscnn": Network("kws_dscnn.onnx", "kws.npz", "input", 200),
    "mnist_cnn": Network("mnist_cnn.onnx", "mnist_t10k_uint8.npz", "Input3", 200),
}


@pytest.mark.shared_data
@pytest.mark.parametrize("name", NETWORKS)
def test_blobs_for_4_6_and_8_shaves_that_depthai_parses(
    installed: Toolchain, shared_data: Path, tmp_path: Path, name: str
) -> None:
    network = NETWORKS[name]
    graph = checked_copy(shared_data / "models" / network.model, tmp_path)
    with np.load(shared_data / "eval" / network.evaluation) as data:
        samples = data["input"][network.calibrate : network.calibrate + 400].astype(np.float32)
    made = lower("oak-d", graph, Precision.FLOAT16, Calibration(network.input, samples[:1]), tmp_path / "out")
    assert made.verified is Verified.COMPILED
    assert set(made.files) == {"model.xml", "model.bin", "model-4.blob", "model-6.blob", "model-8.blob"}
    assert {path.parent for path in made.files.values()} == {tmp_path / "out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(made.files), "nothing else is left there"
    parsed = asked(installed, PARSE, *(str(made.files[f"model-{shaves}.blob"]) for shaves in SHAVES))
    outputs = [output for output, _, _ in made.runtime_options["outputs"]]
    for shaves, (path, found) in zip(SHAVES, parsed.items(), strict=True):
        assert path.endswith(f"model-{shaves}.blob")
        assert found[:2] == [shaves, shaves]
        assert found[2] > 3
        assert found[3:] == [[network.input], sorted(outputs), ["FP16"]]
    # The FP16 file on a CPU: with float32 sums, and with each layer's result rounded.
    expected = np.concatenate([float_answers(graph, sample[None]) for sample in samples])
    for kernel_set in registry.runtime("myriad").kernel_sets:
        answers = executor("oak-d", made, kernel_set)({network.input: samples})[made.outputs[0].name]
        assert np.mean(answers.argmax(axis=1) == expected.argmax(axis=1)) >= 0.99


def test_the_same_bytes_each_time(installed: Toolchain, graph: Path, tmp_path: Path) -> None:
    first, second = lowered(graph, tmp_path / "first"), lowered(graph, tmp_path / "second")
    assert content(first) == content(second)
    assert len({content(first)[f"model-{shaves}.blob"] for shaves in SHAVES}) == 3


def test_the_whole_machines_lock_is_not_taken(installed: Toolchain, graph: Path, tmp_path: Path) -> None:
    """The plugin's own would be ``/tmp/mvnc.mutex``, which one user of a machine keeps from the others."""
    lock = Path("/tmp/mvnc.mutex")
    before = lock.stat().st_mtime_ns if lock.exists() else None
    lowered(graph, tmp_path / "out")
    assert (lock.stat().st_mtime_ns if lock.exists() else None) == before


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_has_the_representation_and_the_blobs(
    installed: Toolchain, graph: Path, tmp_path: Path, name: str
) -> None:
    made = lowered(graph, tmp_path / "out", target_name=name)
    distributions = [need.distribution for need in made.runtimes]
    assert set(target.find(name).runtimes) & set(distributions)
    session = registry.runtime("myriad").load(made.files[made.entry], made.runtime_options)
    assert "CPU" in session.detail
    assert "instead of" in session.detail
    samples = images(6, seed=4)
    answers = executor(name, made)({"image": samples})["score"]
    np.testing.assert_allclose(answers, float_answers(graph, samples), rtol=1e-2, atol=1e-2)
    assert made.inputs[0].shape == (None, 3, 8, 8)
    assert made.inputs[0].file.shape == (1, 3, 8, 8)


def normalized(tmp_path: Path, operator: str, **attributes: Any) -> Path:
    """A small transformer's layer: Gemm, the operator named ``the_one``, Gemm."""
    rng = np.random.default_rng(0)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)

    scale = ["scale", "bias"] if operator == "LayerNormalization" else []
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["image", "w1"], ["a"], name="first"),
            helper.make_node(operator, ["a", *scale], ["b"], name="the_one", **attributes),
            helper.make_node("Gemm", ["b", "w2"], ["score"], name="last"),
        ],
        "normalized",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, ["N", 3])],
        [weight("w1", 6, 8), weight("w2", 8, 3), weight("scale", 8), weight("bias", 8)],
    )
    path = tmp_path / "normalized.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    return checked_copy(path, tmp_path)


@pytest.mark.parametrize(("operator", "layer"), [("LayerNormalization", "MVN"), ("Softsign", "Abs"), ("Sinh", "Sinh")])
def test_what_the_compiler_does_not_take_fails_before_compiling_with_its_layer_and_node(
    installed: Toolchain, tmp_path: Path, operator: str, layer: str
) -> None:
    graph = normalized(tmp_path, operator)
    with pytest.raises(UnsupportedOperatorError, match=rf"'the_one'.*{layer}"):
        lowered(graph, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.blob"))


def test_a_free_axis_beside_the_batch_gets_the_size_that_the_samples_have(installed: Toolchain, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info
    shape = ["N", 3, "H", 8]
    relu = helper.make_node("Relu", ["image"], ["score"], name="relu")
    made = helper.make_graph(
        [relu], "g", [value("image", TensorProto.FLOAT, shape)], [value("score", TensorProto.FLOAT, shape)]
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    found = lowered(checked_copy(path, tmp_path), tmp_path / "out")
    assert [spec.shape for spec in (*found.inputs, *found.outputs)] == [(None, 3, 8, 8)] * 2
    assert found.notes[0] == "fixed as the calibration samples have it: axis 2 of image to 8"


@pytest.mark.parametrize(("shape", "told"), [(["N", 3, 8, 8, 8], "has 5 axes")])
def test_a_shape_that_no_blob_holds(installed: Toolchain, tmp_path: Path, shape: list[Any], told: str) -> None:
    value = helper.make_tensor_value_info
    relu = helper.make_node("Relu", ["image"], ["score"], name="relu")
    made = helper.make_graph(
        [relu], "g", [value("image", TensorProto.FLOAT, shape)], [value("score", TensorProto.FLOAT, shape)]
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    with pytest.raises(LoweringError, match=told):
        lowered(checked_copy(path, tmp_path), tmp_path / "out")


def test_float16_it_is_and_nothing_else(installed: Toolchain, graph: Path, tmp_path: Path) -> None:
    assert registry.compiler("myriad").numerics.precisions == (Precision.FLOAT16,)
    for plan in (Plan(default=Precision.FLOAT32), Plan(default=Precision.FLOAT16, layers={"last": Precision.FLOAT32})):
        with pytest.raises(LoweringError):
            lower("oak-d", graph, plan, Calibration("image", images(1)), tmp_path / "out")
    for wrong in ({"shaves": 5}, {"device": "hddl"}, {"speed": 1}):
        with pytest.raises(TargetError):
            lowered(graph, tmp_path / "out", **wrong)


def test_a_damaged_representation_is_told_by_the_old_release(installed: Toolchain, tmp_path: Path) -> None:
    from kedge_targets.backends.myriad import toolchain_client

    (tmp_path / "model.xml").write_text("<net name='broken'/>")
    (tmp_path / "model.bin").write_bytes(b"")
    with toolchain_client.driver() as driver:
        with pytest.raises(LoweringError, match=r"OpenVINO 2021\.4 cannot read"):
            driver.unsupported(tmp_path / "model.xml")
        with pytest.raises(LoweringError, match=r"compiler failed for \d SHAVEs"):
            driver.compile(tmp_path / "model.xml", SHAVES, tmp_path)


def the_driver() -> types.ModuleType:
    path = declaration.read("myriad").driver
    spec = importlib.util.spec_from_file_location("myriad_driver", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_machine_without_libusb_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = the_driver()
    driver.check_libusb()
    monkeypatch.setattr(driver, "LIBUSB", "libusb-of-no-system.so.0")
    for task, request in (("version", {}), ("query", {}), ("compile_all", {})):
        with pytest.raises(driver.RefusedError) as caught:
            getattr(driver, task)(request)
        assert caught.value.wire["kind"] == "ToolchainError"
        assert "apt-get install libusb-1.0-0" in caught.value.wire["remedy"]


@pytest.mark.parametrize("cut", [10, 300, -1])
def test_a_blob_is_taken_only_when_it_is_whole(installed: Toolchain, graph: Path, tmp_path: Path, cut: int) -> None:
    driver = the_driver()
    whole = lowered(graph, tmp_path / "out").files["model-4.blob"].read_bytes()
    cache = tmp_path / "cache"
    cache.mkdir()
    assert driver.whole_blob(cache) is None
    (cache / "1.blob").write_bytes(b"<header/>\n" + whole[:cut])
    assert driver.whole_blob(cache) is None
    (cache / "1.blob").write_bytes(b"<header/>\n" + whole)
    assert driver.whole_blob(cache) == whole


# What is called on objects whose class the source does not name.
METHODS = [
    "Pipeline.create", "Pipeline.start", "Pipeline.stop", "Device.close", "Device.getDeviceName",
    "node.NeuralNetwork.setBlobPath", "node.NeuralNetwork.setNumInferenceThreads", "node.NeuralNetwork.input",
    "node.NeuralNetwork.out", "Node.Input.createInputQueue", "Node.Output.createOutputQueue", "InputQueue.send",
    "MessageQueue.get", "NNData.addTensor", "NNData.getTensor", "TensorInfo.dataType", "TensorInfo.DataType.FP16",
    "TensorInfo.DataType.U8F", "TensorInfo.DataType.INT", "OpenVINO.Blob.networkInputs", "OpenVINO.Blob.networkOutputs",
    "OpenVINO.Blob.numShaves", "DeviceInfo.platform",
]  # fmt: skip

EXIST = """
import depthai, functools, json, sys
absent = []
for name in sys.argv[1:]:
    try:
        functools.reduce(getattr, name.split("."), depthai)
    except AttributeError:
        absent.append(name)
print(json.dumps(absent))
"""


def dotted(module: types.ModuleType) -> set[str]:
    """``A.b`` of every ``depthai.A.b`` or ``self._depthai.A.b`` in a module's source."""
    found = set()
    for item in ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))):
        text = ast.unparse(item) if isinstance(item, ast.Attribute) else ""
        for prefix in ("depthai.", "self._depthai."):
            if text.startswith(prefix):
                found.add(text.removeprefix(prefix))
    return found


def names_of_fake() -> set[str]:
    """Classes of the fake and their public members, where the real ones have the same names."""
    found = set()
    for name, kind in vars(fake_depthai).items():
        if isinstance(kind, type) and kind.__module__ == fake_depthai.__name__ and not name.startswith("_"):
            members = [member for member in vars(kind) if not member.startswith("_")]
            found |= {f"{name}.{member}" for member in members} | {name}
    own = {"Device.connected", "Device.opened", "Device.firmware", "Pipeline.run_firmware"}
    return found - own


def test_every_name_that_is_used_is_in_the_real_depthai(installed: Toolchain) -> None:
    used = dotted(camera) | dotted(wire) | set(METHODS)
    assert {"Pipeline", "OpenVINO.Blob", "MessageQueue.QueueException", "XLinkPlatform.X_LINK_MYRIAD_X"} <= used
    assert asked(installed, EXIST, *sorted(used | names_of_fake())) == []
    assert asked(installed, EXIST, "Pipeline.createXLinkIn", "NoSuchThing") == ["Pipeline.createXLinkIn", "NoSuchThing"]


HOME = """
import depthai, json, pathlib
depthai.NNData()
print(json.dumps([str(path) for path in pathlib.Path.home().rglob("*") if path.is_file()]))
"""


def test_depthai_keeps_to_itself(installed: Toolchain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(environment, "HOME", str(tmp_path))
    assert asked(installed, HOME) == []
    monkeypatch.delitem(environment, "DEPTHAI_TELEMETRY")
    assert asked(installed, HOME) != [], "it would write where it is not told"


WIRE = """
import depthai, importlib.util, json, numpy, sys
spec = importlib.util.spec_from_file_location("wire", sys.argv[1])
wire = importlib.util.module_from_spec(spec)
spec.loader.exec_module(wire)
blob = depthai.OpenVINO.Blob(sys.argv[2])
(name, info), = blob.networkInputs.items()
array = numpy.load(sys.argv[3])
message = wire.message(depthai, [(name, info, array)])
sent = message.getTensorInfo(name)
raw = numpy.asarray(message.getData())[sent.offset:sent.offset + array.size * 2]
back, = wire.arrays(message, [(name, array.shape, "float32")])
print(json.dumps([raw.tobytes() == array.astype("float16").tobytes(), sent.order.name, list(sent.dims),
                  sent.dataType.name, bool((back == array.astype("float16").astype("float32")).all()),
                  str(back.dtype)]))
"""


def test_the_real_message_holds_the_arrays_as_the_blob_takes_them(
    installed: Toolchain, graph: Path, tmp_path: Path
) -> None:
    blob = lowered(graph, tmp_path / "out").files["model-6.blob"]
    samples: npt.NDArray[np.float32] = images(1, seed=9).transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3)
    assert not samples.flags.c_contiguous
    np.save(tmp_path / "sample.npy", samples)
    said = asked(installed, WIRE, str(Path(wire.__file__)), str(blob), str(tmp_path / "sample.npy"))
    assert said == [True, "NCHW", [1, 3, 8, 8], "FP16", True, "float32"]


@pytest.mark.shared_data
def test_through_the_real_command(installed: Toolchain, shared_data: Path, tmp_path: Path) -> None:
    with np.load(shared_data / "eval" / "kws.npz") as data:
        samples, labels = data["input"].astype(np.float32), data["label"]
    np.savez(tmp_path / "calibration.npz", input=samples[:200])
    np.savez(tmp_path / "evaluation.npz", input=samples[200:600], label=labels[200:600])
    model, out = shared_data / "models" / "kws_dscnn.onnx", tmp_path / "out"
    arguments = ["compile", str(model), "--name", "kws", "--version", "1.0", "-o", str(out)]
    arguments += ["--calibration", str(tmp_path / "calibration.npz"), "--evaluation", str(tmp_path / "evaluation.npz")]
    for name in ("oak-d", "ncs2", "intel-npu"):
        arguments += ["--target", name]
    command = [sys.executable, "-m", "kedge.cli.main", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    Layout(out).verify()
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    found = {one["target"]: (one["precision"], one["verified"], one["drop"] <= 0.01) for one in report["bundles"]}
    assert found == {
        "oak-d": ("float16", "compiled", True),
        "ncs2": ("float16", "compiled", True),
        "intel-npu": ("int8", "checked", True),
    }

"""A device with a fake TensorRT (or without one), and small bundles for it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kedge_protocol import golden
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle.layout import Layout
from kedge_targets.backends.tensorrt import api, cuda, recipe
from tests.support.bundles import Packed, write_bundle

FAKE = Path(__file__).parent / "fake_tensorrt"
VERSIONS = {"8.6": ("v8_6", "cudart"), "10.3": ("v10_3", "bindings"), "11": ("v11", "bindings")}
"""Version → folders: the package, and the shape of cuda-python that goes with it."""
FEATURES, CLASSES = 16, 4
_MODULES = ("tensorrt", "cuda", "fake_")


@dataclass
class Device:
    """A device with a fake TensorRT.

    Attributes:
        cache: where its engines are kept.
        log: what its TensorRT did, see :meth:`did`.
    """

    cache: Path
    log: Path
    patch: pytest.MonkeyPatch

    def install(self, version: str) -> None:
        """Another TensorRT from here on, in this process and in children."""
        self.remove()
        package, cuda_python = VERSIONS[version]
        folders = [str(FAKE / name) for name in ("common", package, cuda_python)]
        sys.path[:0] = folders
        inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        kept = [path for path in inherited if path and not path.startswith(str(FAKE))]
        self.patch.setenv("PYTHONPATH", os.pathsep.join([*folders, *(kept or sys.path)]))

    def remove(self) -> None:
        """No TensorRT."""
        sys.path[:] = [path for path in sys.path if not path.startswith(str(FAKE))]
        for name in [name for name in sys.modules if name.split(".")[0].startswith(_MODULES)]:
            del sys.modules[name]
        api.load.cache_clear()
        cuda.library.cache_clear()

    def did(self) -> list[str]:
        """``build int8``, ``deserialize fp16``, …, in order, of all processes; then the list begins anew."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def engines(self) -> list[Path]:
        """The kept engines' files."""
        return sorted((self.cache / "tensorrt").glob("engine-*.kept"))


def device(tmp_path: Path, patch: pytest.MonkeyPatch, version: str | None) -> Device:
    """A device; the caller calls :meth:`Device.remove` in the end."""
    made = Device(tmp_path / "cache", tmp_path / "trt.log", patch)
    patch.setenv("FAKE_TENSORRT_LOG", str(made.log))
    patch.setenv("KEDGE_CACHE", str(made.cache))
    made.remove()
    if version is not None:
        made.install(version)
    return made


def samples(count: int, *, seed: int = 5) -> npt.NDArray[np.float32]:
    """Raw samples for the bundles here: float32 [count, 16]."""
    return np.random.default_rng(seed).uniform(-1, 1, size=(count, FEATURES)).astype(np.float32)


def graphs(*, batch: int | None, seed: int = 0, asymmetric: bool = False) -> dict[str, bytes]:
    """The int8 (explicit QDQ, symmetric, per channel, floating-point bias) and fp16 graphs of one small network.

    Args:
        batch: fixed, or None for a free one.
        asymmetric: the int8 graph has a zero-point other than 0, which NVIDIA's parser refuses.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(seed)
    weight = random.normal(size=(FEATURES, CLASSES)).astype(np.float32)
    bias = random.normal(size=CLASSES).astype(np.float32)
    scale = (np.abs(weight).max(axis=0) / 127).astype(np.float32)
    tensors = {
        "x_scale": np.float32(1 / 127),
        "x_zero": np.int8(3 if asymmetric else 0),
        "w_float": weight,  # 8.6 takes no int8 constants
        "w_scale": scale,
        "w_zero": np.zeros(CLASSES, dtype=np.int8),
        "bias": bias,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "x_scale", "x_zero"], ["x_q"], name="quantize_input"),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], name="dequantize_input"),
        helper.make_node("QuantizeLinear", ["w_float", "w_scale", "w_zero"], ["w_q"], name="quantize_weight", axis=1),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w"], name="dequantize_weight", axis=1),
        helper.make_node("MatMul", ["x_dq", "w"], ["product"], name="matmul"),
        helper.make_node("Add", ["product", "bias"], ["scores"], name="add_bias"),
    ]
    halves = {"w": weight.astype(np.float16), "bias": bias.astype(np.float16)}
    half_nodes = [
        helper.make_node("Cast", ["input"], ["x"], name="to_half", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["x", "w"], ["product"], name="matmul"),
        helper.make_node("Add", ["product", "bias"], ["sum"], name="add_bias"),
        helper.make_node("Cast", ["sum"], ["scores"], name="to_float", to=TensorProto.FLOAT),
    ]
    made = {}
    for name, its_nodes, its_tensors in ((recipe.INT8, nodes, tensors), (recipe.FP16, half_nodes, halves)):
        graph = helper.make_graph(
            its_nodes,
            "small",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "N", FEATURES])],
            [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch or "N", CLASSES])],
            [numpy_helper.from_array(np.asarray(value), key) for key, value in its_tensors.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(model)
        made[name] = bytes(model.SerializeToString(deterministic=True))
    return made


def release(
    folder: Path,
    *,
    name: str = "small",
    version: str = "1.0",
    target: str = "generic-cpu",
    batch: int | None = 1,
    seed: int = 0,
    asymmetric: bool = False,
    only: str | None = None,
    options: dict[str, float] | None = None,
) -> Path:
    """A release of one bundle, its golden vectors measured over both graphs with ONNX Runtime."""
    import onnxruntime

    folder.mkdir(parents=True, exist_ok=True)
    made = {k: v for k, v in graphs(batch=batch, seed=seed, asymmetric=asymmetric).items() if only in (None, k)}
    files = {}
    for kind, raw in made.items():
        files[recipe.FILES[kind]] = folder / recipe.FILES[kind]
        files[recipe.FILES[kind]].write_bytes(raw)
    shapes = [(batch, FEATURES)] * 3 if batch else [(1, FEATURES), (1, FEATURES), (8, FEATURES)]
    recipe.write(
        recipe.Recipe(
            precisions=tuple(made),
            files={kind: recipe.FILES[kind] for kind in made},
            workspace_bytes=64 << 20,
            inputs=(recipe.InputProfile(name="input", minimum=shapes[0], optimum=shapes[1], maximum=shapes[2]),),
            outputs=("scores",),
        ),
        folder / recipe.ENTRY,
    )
    files[recipe.ENTRY] = folder / recipe.ENTRY
    inputs = samples(8)
    runs = []
    for raw in made.values():
        session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
        step = batch or len(inputs)
        parts = [session.run(None, {"input": inputs[i : i + step]})[0] for i in range(0, len(inputs), step)]
        runs.append(np.concatenate(parts))
    allowed = max(float(np.abs(runs[0] - run).max()) for run in runs) * 1.5 + 1e-3
    packed = Packed(
        backend="tensorrt",
        files=files,
        entry=recipe.ENTRY,
        inputs=(_spec("input", FEATURES, batch),),
        outputs=(_spec("scores", CLASSES, batch),),
        vectors=golden.Golden(
            {"input": inputs}, {"scores": runs[0]}, {"scores": golden.Tolerance(max_abs=allowed, rms=allowed)}
        ),
        runtimes=(cfg.RuntimeRequirement(distribution="onnxruntime", minimum="1.17"),),
        runtime_options=options or {},
        kernel_sets=tuple(made),
        precision="int8",
    )
    return write_bundle(folder / "release", packed, name=name, version=version, target=target)


def unpacked(layout: Path, folder: Path, *, target: str = "generic-cpu") -> tuple[Path, cfg.BundleConfig]:
    """A bundle's files by title, as in a slot, and its configuration."""
    opened = Layout(layout)
    bundle = opened.bundle(target)
    folder.mkdir(parents=True, exist_ok=True)
    for title, layer in bundle.files.items():
        (folder / title).write_bytes(opened.blob_path(layer.digest).read_bytes())
    (folder / "config.json").write_bytes(bundle.config_raw)
    return folder, bundle.config


def _spec(name: str, width: int, batch: int | None) -> cfg.TensorSpec:
    return cfg.TensorSpec(
        name=name,
        shape=(None, width),
        dtype="float32",
        file=cfg.FileTensor(name=name, index=0, shape=(batch, width), dtype="float32"),
    )

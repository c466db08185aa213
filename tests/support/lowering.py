"""Lowering graphs by a backend and running what came out, for tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from kedge_targets import contract, registry, target
from kedge_targets.contract import Lowered
from kedge_targets.executor import Executor
from kedge_targets.graph import library, model_reader, model_writer
from kedge_targets.numerics import Plan, Precision

Array = npt.NDArray[Any]


class Calibration:
    """Samples of one input, streamed one at a time; counts how often it was read."""

    def __init__(self, name: str, samples: Array) -> None:
        self._name = name
        self._samples = samples
        self.passes = 0

    @property
    def samples(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        self.passes += 1
        for sample in self._samples:
            yield {self._name: sample[None]}


@dataclass(frozen=True)
class Case:
    """A shared model with its split: the first samples calibrate, the rest evaluate."""

    model: Path
    calibration: Array
    evaluation: Array
    labels: Array

    @classmethod
    def of(cls, shared_data: Path, model: str, evaluation: str, calibrate: int) -> Case:
        with np.load(shared_data / "eval" / evaluation) as arrays:
            samples, labels = arrays["input"].astype(np.float32), arrays["label"]
        return cls(
            shared_data / "models" / model, samples[:calibrate], samples[calibrate:], labels[calibrate:].astype(int)
        )


def ic(shared_data: Path) -> Case:
    return Case.of(shared_data, "ic_resnet8.onnx", "ic.npz", 50)


def kws(shared_data: Path) -> Case:
    return Case.of(shared_data, "kws_dscnn.onnx", "kws.npz", 200)


def checked_copy(model: Path, folder: Path) -> Path:
    """What the host gives to a backend: the user's model, checked, with shapes inferred."""
    path = folder / "graph.onnx"
    model_writer.save(model_reader.read(model), path)
    return path


def lower(
    target_name: str,
    graph: Path,
    plan: Plan | Precision,
    calibration: contract.Calibration,
    workdir: Path,
    /,
    **options: Any,
) -> Lowered:
    """Lower by the first backend of one of Kedge's targets, with its options and ``options``."""
    device = target.find(target_name)
    choice = device.backends[0]
    workdir.mkdir(parents=True, exist_ok=True)
    return registry.compiler(choice.name).lower(
        graph,
        plan if isinstance(plan, Plan) else Plan(default=plan),
        calibration,
        target=device,
        options={**choice.options, **options},
        workdir=workdir,
    )


def precisions(target_name: str) -> tuple[Precision, ...]:
    """All that the target's first backend says it carries."""
    return registry.compiler(target.find(target_name).backends[0].name).numerics.precisions


def executor(target_name: str, lowered: Lowered, kernel_set: str | None = None) -> Executor:
    return Executor(
        lowered.files[lowered.entry].parent,
        backend=target.find(target_name).backends[0].name,
        entry=lowered.entry,
        options=lowered.runtime_options,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        kernel_set=kernel_set,
    )


def float_answers(model: Path, samples: Array) -> Array:
    """The first output of the float model, by ONNX Runtime."""
    session = library.load().InferenceSession(str(model), providers=["CPUExecutionProvider"])
    answers: Array = session.run(None, {session.get_inputs()[0].name: samples})[0]
    return answers


def top1(answers: Array, labels: Array) -> float:
    return float((answers.argmax(axis=1) == labels).mean())


def size(lowered: Lowered) -> int:
    return sum(path.stat().st_size for path in lowered.files.values())


def content(lowered: Lowered) -> dict[str, bytes]:
    return {title: path.read_bytes() for title, path in lowered.files.items()}


def classifier(*, batch: int | str = "N", opset: int = 17, ir_version: int = 8, seed: int = 0) -> onnx.ModelProto:
    """A small network: Conv, Relu, Conv, Relu, average over the picture, Gemm. Input ``image`` N x 3 x 8 x 8, output
    ``score`` N x 4."""
    rng = np.random.default_rng(seed)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array((rng.standard_normal(shape) * 0.3).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], name="first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="first_relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], name="second_relu"),
        helper.make_node("GlobalAveragePool", ["r2"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flat"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["score"], name="last", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("score", TensorProto.FLOAT, [batch, 4])],
        [
            weight("w1", 8, 3, 3, 3), weight("b1", 8), weight("w2", 16, 8, 3, 3), weight("b2", 16),
            weight("w3", 4, 16), weight("b3", 4),
        ],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def images(count: int, *, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)

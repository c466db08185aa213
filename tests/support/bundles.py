"""Builders of small, real releases: a model that runs, golden vectors that were measured on it, valid digests.

:func:`make_bundle` needs only onnx and onnxruntime; :func:`make_tflite_bundle` packs a given ``.tflite`` file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import blocks, digest, golden
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle.write import new_layout

Array = npt.NDArray[Any]

FEATURES, HIDDEN, CLASSES = 16, 32, 4
"""Of the tiny MLP: input ``input`` float32 [N, 16], output ``scores`` float32 [N, 4]."""
_ROW = 1024
_GOLDEN_SAMPLES = 8


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A model's files with what a bundle must say of them."""

    backend: str
    files: Mapping[str, Path]
    entry: str
    inputs: tuple[cfg.TensorSpec, ...]
    outputs: tuple[cfg.TensorSpec, ...]
    vectors: golden.Golden
    runtimes: tuple[cfg.RuntimeRequirement, ...]
    runtime_options: Mapping[str, Any]
    kernel_sets: tuple[str, ...]
    precision: str = "float32"
    labels: tuple[str, ...] = ()


def samples(count: int, *, seed: int = 1234) -> Array:
    """Raw samples for the tiny MLP: float32 [count, 16]."""
    return np.random.default_rng(seed).normal(size=(count, FEATURES)).astype(np.float32)


def mlp(
    *, seed: int = 0, head_seed: int | None = None, mebibytes: float = 0, double: bool = False, batch: int | None = None
) -> bytes:
    """The ONNX bytes of the tiny MLP; equal arguments give equal bytes.

    Args:
        seed: of all weights.
        head_seed: another head (last layer) and another last twentieth of the padding; the rest, and each byte's
            place, stay as ``seed`` made them.
        mebibytes: of padding, a table of random floats; each sample looks up one row of it by its hidden values and
            adds the row's mean to its scores, so that no optimizer can drop it.
        double: a second input ``offset`` [N, 4], added to the scores, and a second output ``hidden`` [N, 32].
        batch: fixed first axis; None leaves it free.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    body = np.random.default_rng(seed)
    weights = {
        "w1": body.normal(size=(FEATURES, HIDDEN)).astype(np.float32),
        "b1": body.normal(size=HIDDEN).astype(np.float32),
        "w2": body.normal(size=(HIDDEN, CLASSES)).astype(np.float32),
        "b2": body.normal(size=CLASSES).astype(np.float32),
    }
    if mebibytes:
        rows = max(HIDDEN, int(mebibytes * (1 << 20)) // (4 * _ROW))
        weights["table"] = body.standard_normal(size=(rows, _ROW), dtype=np.float32)
    if head_seed is not None:
        head = np.random.default_rng(head_seed)
        weights["w2"] = head.normal(size=(HIDDEN, CLASSES)).astype(np.float32)
        if mebibytes:
            changed = max(1, len(weights["table"]) // 20)
            weights["table"][-changed:] = head.standard_normal(size=(changed, _ROW), dtype=np.float32)
    nodes = [
        helper.make_node("Gemm", ["input", "w1", "b1"], ["pre"], name="fc1"),
        helper.make_node("Relu", ["pre"], ["hidden"], name="relu1"),
        helper.make_node("Gemm", ["hidden", "w2", "b2"], ["head"], name="fc2"),
    ]
    last = "head"
    if mebibytes:
        nodes += [
            helper.make_node("ArgMax", ["hidden"], ["row"], axis=1, keepdims=0, name="pick"),
            helper.make_node("Gather", ["table", "row"], ["looked_up"], axis=0, name="look_up"),
            helper.make_node("ReduceMean", ["looked_up"], ["bias"], axes=[1], keepdims=1, name="mean"),
            helper.make_node("Add", [last, "bias"], ["padded"], name="add_padding"),
        ]
        last = "padded"
    inputs = [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch or "N", FEATURES])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch or "N", CLASSES])]
    if double:
        nodes.append(helper.make_node("Add", [last, "offset"], ["shifted"], name="add_offset"))
        last = "shifted"
        inputs.append(helper.make_tensor_value_info("offset", TensorProto.FLOAT, [batch or "N", CLASSES]))
        outputs.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, [batch or "N", HIDDEN]))
    nodes.append(helper.make_node("Identity", [last], ["scores"], name="scores"))
    graph = helper.make_graph(
        nodes, "tiny", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in weights.items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString(deterministic=True))


def zero_weights(model: bytes, name: str = "w1") -> bytes:
    """The same ONNX file with one weight tensor all zero."""
    import onnx
    from onnx import numpy_helper

    loaded = onnx.load_model_from_string(model)
    for initializer in loaded.graph.initializer:
        if initializer.name == name:
            zeros = np.zeros_like(numpy_helper.to_array(initializer))
            initializer.CopyFrom(numpy_helper.from_array(zeros, name))
            return bytes(loaded.SerializeToString(deterministic=True))
    raise KeyError(name)


def write_bundle(
    path: Path,
    packed: Packed | Sequence[Packed],
    *,
    name: str,
    version: str,
    target: str | Sequence[str],
    replace_existing: bool = False,
) -> Path:
    """Write a release whose bundles (of each target one, or several by different backends) hold the same files; returns
    ``path``."""
    targets = [target] if isinstance(target, str) else list(target)
    several = [packed] if isinstance(packed, Packed) else list(packed)
    with tempfile.TemporaryDirectory() as scratch, new_layout(path, replace=replace_existing) as writer:
        for place, each in enumerate(several):
            golden_path = Path(scratch) / f"golden-{place}.npz"
            golden.save(each.vectors, golden_path)
            for one in targets:
                writer.add_bundle(_config(each, golden_path, name, version, one), each.files, golden_path)
        writer.add_release(name, version)
    return path


def _config(packed: Packed, golden_path: Path, name: str, version: str, target: str) -> cfg.BundleConfig:
    model_digest = digest.of_file(packed.files[packed.entry])
    return cfg.BundleConfig(
        schema_version=cfg.SCHEMA_VERSION,
        name=name,
        version=version,
        target=target,
        backend=packed.backend,
        entry=packed.entry,
        precision=packed.precision,
        runtimes=packed.runtimes,
        inputs=packed.inputs,
        outputs=packed.outputs,
        metric=cfg.Metric(name="top1", value=1.0, reference=1.0, samples=_GOLDEN_SAMPLES, measured_on="test"),
        resources=cfg.Resources(
            storage_bytes=sum(file.stat().st_size for file in packed.files.values()), memory_bytes=1 << 20
        ),
        provenance=cfg.Provenance(
            model_digest=model_digest,
            calibration_digest=None,
            evaluation_digest=model_digest,
            calibration_samples=0,
            evaluation_samples=_GOLDEN_SAMPLES,
            tools={},
        ),
        verified=cfg.Verified.EXECUTED,
        golden=cfg.GoldenRef(
            file="golden.npz",
            digest=digest.of_file(golden_path),
            samples=packed.vectors.samples,
            kernel_sets=packed.kernel_sets,
        ),
        labels=packed.labels,
        runtime_options=dict(packed.runtime_options),
    )


def make_bundle(
    folder: Path,
    name: str = "tiny",
    version: str = "1.0",
    target: str | Sequence[str] = "generic-cpu",
    *,
    seed: int = 0,
    head_seed: int | None = None,
    mebibytes: float = 0,
    double: bool = False,
    batch: int | None = None,
    preprocess: cfg.Preprocess | None = None,
    labels: tuple[str, ...] = (),
    broken: str | None = None,
    backend: str = "onnxruntime",
    also: Mapping[str, str | None] | None = None,
) -> Path:
    """A valid release of the tiny MLP, at ``folder / f"{name}-{version}"``.

    Args:
        target: one bundle for each; all hold the same files.
        seed, head_seed, mebibytes, double, batch: see :func:`mlp`. The file ``model.onnx`` is ``mebibytes`` MiB and a
            few KiB; with another ``head_seed`` about a twentieth of its blocks differ.
        preprocess: stated in the bundle and applied in the golden vectors.
        broken: ``"golden"``: the vectors expect other outputs; ``"weights"``: the file has a zeroed weight tensor,
            the vectors are the healthy file's; ``"file"``: the file is no model. Digests are valid in all cases.
        backend: one that reads ONNX files and has its distribution's name.
        also: further such backends, each with what is broken in its bundle (``"golden"`` or None): each target gets a
            candidate by each.

    Returns:
        The OCI image layout's folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        model = mlp(seed=seed, head_seed=head_seed, mebibytes=mebibytes, double=double, batch=batch)
        vectors = _mlp_vectors(model, double=double, batch=batch, preprocess=preprocess)
        healthy = vectors
        if broken == "golden":
            vectors = replace(vectors, outputs={key: 1.0 - value for key, value in vectors.outputs.items()})
        elif broken == "weights":
            model = zero_weights(model)
        elif broken == "file":
            model = b"this is no model" * 64
        elif broken is not None:
            raise ValueError(broken)
        file = Path(scratch) / "model.onnx"
        file.write_bytes(model)
        names = [("input", FEATURES), ("offset", CLASSES)] if double else [("input", FEATURES)]
        results = [("scores", CLASSES), ("hidden", HIDDEN)] if double else [("scores", CLASSES)]
        inputs = tuple(_spec(tensor, index, (batch, size)) for index, (tensor, size) in enumerate(names))
        packed = Packed(
            backend=backend,
            files={"model.onnx": file},
            entry="model.onnx",
            inputs=(replace(inputs[0], preprocess=preprocess), *inputs[1:]),
            outputs=tuple(_spec(tensor, index, (batch, size)) for index, (tensor, size) in enumerate(results)),
            vectors=vectors,
            runtimes=(cfg.RuntimeRequirement(distribution=backend, minimum="1.20"),),
            runtime_options={"threads": 1},
            kernel_sets=("default",),
            labels=labels,
        )
        candidates = [packed]
        for other, fault in (also or {}).items():
            outputs = {key: 1.0 - value for key, value in healthy.outputs.items()} if fault else healthy.outputs
            candidates.append(
                replace(
                    packed,
                    backend=other,
                    runtimes=(cfg.RuntimeRequirement(distribution=other, minimum="1"),),
                    vectors=replace(healthy, outputs=outputs),
                )
            )
        return write_bundle(folder / f"{name}-{version}", candidates, name=name, version=version, target=target)


def _spec(name: str, index: int, shape: tuple[int | None, ...]) -> cfg.TensorSpec:
    file = cfg.FileTensor(name=name, index=index, shape=shape, dtype="float32")
    return cfg.TensorSpec(name=name, shape=(None, *shape[1:]), dtype="float32", file=file)


def _mlp_vectors(model: bytes, *, double: bool, batch: int | None, preprocess: cfg.Preprocess | None) -> golden.Golden:
    import onnxruntime

    from kedge_targets.pipeline import normalization

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    raw = {"input": samples(_GOLDEN_SAMPLES)}
    if double:
        raw["offset"] = np.linspace(-1, 1, _GOLDEN_SAMPLES * CLASSES, dtype=np.float32).reshape(-1, CLASSES)
    feed = dict(raw)
    if preprocess is not None:
        feed["input"] = normalization.apply(raw["input"], preprocess, layout=None)
    step = batch or _GOLDEN_SAMPLES
    names = [output.name for output in session.get_outputs()]
    parts = [
        session.run(names, {key: value[start : start + step] for key, value in feed.items()})
        for start in range(0, _GOLDEN_SAMPLES, step)
    ]
    outputs = {name: np.concatenate([part[index] for part in parts]) for index, name in enumerate(names)}
    # Float sums in another order on another processor differ by a few units in the last place.
    allowed = {
        name: golden.Tolerance(1e-4 * float(np.abs(value).max()), 1e-5 * float(np.abs(value).max()) + 1e-6)
        for name, value in outputs.items()
    }
    return golden.Golden(raw, outputs, allowed)


def make_tflite_bundle(
    folder: Path,
    model: Path,
    raw: Array,
    name: str = "tiny",
    version: str = "1.0",
    target: str | Sequence[str] = "rpi4",
    *,
    layout: str | None = None,
    labels: tuple[str, ...] = (),
    threads: int = 1,
) -> Path:
    """A release of a given ``.tflite`` file with one input and one output and its batch fixed at 1, at
    ``folder / f"{name}-{version}"``. The golden vectors are the first 8 of ``raw`` [N, ...], the tolerance is half as
    much again as its two kernel sets differ.

    Raises:
        ValueError: the runtime refuses the file.
    """
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    raw = np.asarray(raw[:_GOLDEN_SAMPLES], dtype=np.float32)
    results: list[Array] = []
    for resolver in (OpResolverType.AUTO, OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES):
        interpreter = Interpreter(str(model), experimental_op_resolver_type=resolver, num_threads=1)
        interpreter.allocate_tensors()
        given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        rows = []
        for sample in raw:
            interpreter.set_tensor(given["index"], _quantized(sample[None], given))
            interpreter.invoke()
            rows.append(_real(interpreter.get_tensor(made["index"]), made))
        results.append(np.concatenate(rows))
    largest, rms = golden.deviation(results[0], results[1])
    resolution = float(made["quantization"][0]) or 1e-5
    packed = Packed(
        backend="tflite",
        files={"model.tflite": model},
        entry="model.tflite",
        inputs=(_tflite_spec("input", given, layout),),
        outputs=(_tflite_spec("output", made, None),),
        vectors=golden.Golden(
            {"input": raw},
            {"output": results[0]},
            {"output": golden.Tolerance(1.5 * largest + resolution, 1.5 * rms + resolution)},
        ),
        runtimes=(
            cfg.RuntimeRequirement(distribution="ai-edge-litert", minimum="2.1"),
            cfg.RuntimeRequirement(distribution="tflite-runtime", minimum="2.14.0"),
        ),
        runtime_options={"threads": threads},
        kernel_sets=("xnnpack", "builtin"),
        precision="int8" if given["quantization"][0] else "float32",
        labels=labels,
    )
    return write_bundle(folder / f"{name}-{version}", packed, name=name, version=version, target=target)


def _quantized(real: Array, details: dict[str, Any]) -> Array:
    scale, zero_point = details["quantization"]
    if not scale:
        return real.astype(details["dtype"])
    info = np.iinfo(details["dtype"])
    return np.clip(np.rint(real / np.float32(scale)) + zero_point, info.min, info.max).astype(details["dtype"])


def _real(value: Array, details: dict[str, Any]) -> Array:
    scale, zero_point = details["quantization"]
    if not scale:
        return np.array(value, dtype=np.float32)
    return ((value.astype(np.float32) - zero_point) * np.float32(scale)).astype(np.float32)


def _tflite_spec(name: str, details: dict[str, Any], layout: str | None) -> cfg.TensorSpec:
    scale, zero_point = details["quantization"]
    shape = tuple(int(axis) for axis in details["shape"])
    file = cfg.FileTensor(
        name=details["name"],
        index=0,
        shape=shape,
        dtype=np.dtype(details["dtype"]).name,
        scale=float(scale) or None,
        zero_point=int(zero_point) if scale else None,
    )
    return cfg.TensorSpec(name=name, shape=(None, *shape[1:]), dtype="float32", file=file, layout=layout)


def iter_hashes(block_map: bytes) -> Iterator[bytes]:
    """The hashes of a block map in order."""
    for start in range(0, len(block_map), blocks.HASH_SIZE):
        yield block_map[start : start + blocks.HASH_SIZE]

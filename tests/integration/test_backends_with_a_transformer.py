"""A small encoder with an attention mask, two integer inputs and free lengths, through the backends that read ONNX."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.lowering import checked_copy, executor, lower, precisions

from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import LoweringError
from kedge_targets import registry, target
from kedge_targets.graph import attention, batch, layers, library, model_reader, signature
from kedge_targets.numerics import Plan, Precision

Feed = dict[str, npt.NDArray[Any]]


class Sentences:
    """Samples of different lengths."""

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self._feeds: list[Feed] = []
        for length in rng.integers(5, 20, count):
            mask = np.ones((1, length), np.int64)
            mask[0, length - rng.integers(0, 3) :] = 0
            self._feeds.append({"ids": rng.integers(0, 100, (1, length)), "mask": mask})
        self.samples = count

    def __iter__(self) -> Iterator[Feed]:
        return iter(self._feeds)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("encoder")

    class Encoder(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(100, 64)
            layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, activation="gelu")
            self.layers = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = torch.nn.Linear(64, 5)

        def forward(self, ids: Any, mask: Any) -> Any:
            hidden = self.layers(self.embed(ids), src_key_padding_mask=mask == 0)
            weight = mask.unsqueeze(-1).float()
            return self.head((hidden * weight).sum(1) / weight.sum(1))

    torch.manual_seed(0)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    torch.onnx.export(
        Encoder().eval(),
        (torch.randint(0, 100, (2, 12)), torch.ones(2, 12, dtype=torch.int64)),
        str(folder / "encoder.onnx"),
        dynamo=True,
        external_data=False,
        input_names=["ids", "mask"],
        output_names=["meaning"],
        dynamic_shapes={"ids": dims, "mask": dims},
        verbose=False,
    )
    return checked_copy(folder / "encoder.onnx", folder)


def test_its_signature(graph: Path) -> None:
    model = model_reader.load(graph)
    assert [(info.name, info.shape, info.dtype) for info in signature.inputs(model)] == [
        ("ids", (None, None), "int64"),
        ("mask", (None, None), "int64"),
    ]
    assert batch.size(model) is None


def test_products_of_activations_are_integers_where_they_are_asked_for(graph: Path, tmp_path: Path) -> None:
    device = target.find("generic-cpu")
    usual = registry.compiler(device.backends[0].name).quantized_for(device)[0]
    name = attention.products(model_reader.load(graph))[0]
    for label, named, way, expected in (
        ("usual", {}, None, 0),
        ("named", {name: Precision.INT8}, None, 1),
        ("all", {}, dataclasses.replace(usual, products=True), 4),
    ):
        plan = Plan(default=Precision.INT8, layers=named, scheme=way)
        lowered = lower("generic-cpu", graph, plan, Sentences(30, 1), tmp_path / label)
        made = model_reader.load(lowered.files[lowered.entry])
        maker = {tensor: node.op_type for node in made.graph.node for tensor in node.output}
        constant = {tensor.name for tensor in made.graph.initializer}
        read = {
            node.name
            for node in made.graph.node
            if node.op_type == "MatMul"
            and {maker.get(tensor) for tensor in node.input} == {"DequantizeLinear"}
            and not any(one.input[0] in constant for one in made.graph.node if set(one.output) & set(node.input))
        }
        assert len(read) == expected
        # Whoever reads the report is told.
        assert len(lowered.floating) == 4 - expected
        assert (name in lowered.floating) == (label == "usual")
        told = f"{4 - expected} products of two activations (attention) stay in float"
        assert [note.partition(":")[0] for note in lowered.notes] == [told] * (expected < 4)


KEPT = {
    Precision.INT8: 0.99,
    Precision.INT8_DYNAMIC: 0.999,
    Precision.CODEBOOK8: 0.999,
    Precision.LOG8: 0.999,
    Precision.INT4: 0.99,
    Precision.CODEBOOK4: 0.99,
    Precision.LOG4: 0.95,
}
"""The median cosine of a sentence's meaning with that of the float graph; meanings of five numbers are fickle."""
FOUR_BITS = {Precision.INT4, Precision.CODEBOOK4, Precision.LOG4}
LOOK_AT_SAMPLES = FOUR_BITS | {Precision.INT8}


@pytest.mark.parametrize(
    ("target_name", "precision"),
    [(target_name, one) for target_name in ("generic-cpu", "intel-cpu") for one in precisions(target_name)],
)
def test_the_meaning_is_kept(graph: Path, tmp_path: Path, target_name: str, precision: Precision) -> None:
    lowered = lower(target_name, graph, precision, Sentences(30, 1), tmp_path / "out")
    assert lowered.calibration_samples == (30 if precision in LOOK_AT_SAMPLES else 0)
    session = library.load().InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    held_out = list(Sentences(20, 2))
    expected = np.concatenate([session.run(None, feed)[0] for feed in held_out])
    for kernel_set in registry.runtime(target.find(target_name).backends[0].name).kernel_sets:
        model = executor(target_name, lowered, kernel_set)
        actual = np.concatenate([model(feed)["meaning"] for feed in held_out])
        lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
        cosine = (actual * expected).sum(axis=1) / lengths
        assert np.median(cosine) > KEPT.get(precision, 0.9999)
        assert precision in FOUR_BITS or cosine.min() > 0.99


class Filled(Sentences):
    """The same, filled up to one length; the mask hides the rest."""

    def __init__(self, count: int, seed: int, length: int = 20) -> None:
        super().__init__(count, seed)
        self._feeds = [
            {name: np.pad(value, ((0, 0), (0, length - value.shape[1]))) for name, value in feed.items()}
            for feed in self._feeds
        ]


@pytest.mark.usefixtures("tflite_toolchain")
@pytest.mark.parametrize(
    ("precision", "kept"),
    [
        (Precision.FLOAT32, 0.99999),
        (Precision.FLOAT16, 0.9999),
        (Precision.INT8_DYNAMIC, 0.999),
        # Its mask is minus infinity, on which TensorFlow's quantizer aborts.
        (Precision.INT8, 0.99),
    ],
)
def test_where_shapes_are_fixed_it_gets_the_samples_length(
    graph: Path, tmp_path: Path, precision: Precision, kept: float
) -> None:
    lowered = lower("rpi4", graph, precision, Filled(8, 1), tmp_path / "out")
    assert {spec.name: spec.shape for spec in lowered.inputs} == {"ids": (None, 20), "mask": (None, 20)}
    assert lowered.notes[0] == "fixed as the calibration samples have it: axis 1 of ids to 20, axis 1 of mask to 20"
    if precision is not Precision.FLOAT32:
        weights = sum(tensor.ByteSize() for tensor in model_reader.load(graph).graph.initializer)
        share = (lowered.files[lowered.entry].stat().st_size) / weights
        assert share < (0.6 if precision is Precision.FLOAT16 else 0.4)
    session = library.load().InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    # What stands in the filled places changes nothing.
    short, filled = list(Sentences(20, 2)), list(Filled(20, 2))
    expected = np.concatenate([session.run(None, feed)[0] for feed in short])
    for kernel_set in registry.runtime(target.find("rpi4").backends[0].name).kernel_sets:
        model = executor("rpi4", lowered, kernel_set)
        actual = np.concatenate([model(feed)["meaning"] for feed in filled])
        lengths = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
        assert np.median((actual * expected).sum(axis=1) / lengths) > kept


@pytest.mark.usefixtures("tflite_toolchain")
def test_a_length_that_no_sample_tells_is_refused_where_one_is_needed(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="there are no samples"):
        lower("rpi4", graph, Precision.INT8_DYNAMIC, Sentences(0, 1), tmp_path / "none")


@pytest.mark.usefixtures("tensorrt_toolchain")
def test_nvidias_parser_takes_it_with_several_float_layers_behind_one_tensor(graph: Path, tmp_path: Path) -> None:
    readers: dict[str, list[str]] = {}
    for layer in layers.layers(model_reader.load(graph)):
        if layer.operator in ("Gemm", "MatMul") and layer.weight is not None:
            readers.setdefault(layer.activations[0], []).append(layer.name)
    # Whatever the exporter made of queries, keys and values; and what is computed of an activation beside its layer.
    nodes = model_reader.load(graph).graph.node
    behind = {tensor: [node.name for node in nodes if tensor in node.input] for tensor in readers}
    kept = next(names for tensor, names in behind.items() if len(names) > 1)
    plan = Plan(default=Precision.INT8, layers=dict.fromkeys(kept, Precision.FLOAT32))
    lowered = lower("jetson-orin-nano", graph, plan, Sentences(30, 1), tmp_path / "out")
    assert lowered.verified is Verified.CHECKED
    assert [spec.shape for spec in lowered.inputs] == [(None, None), (None, None)]
    session = library.load().InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    for kernel_set in registry.runtime(target.find("jetson-orin-nano").backends[0].name).kernel_sets:
        model = executor("jetson-orin-nano", lowered, kernel_set)
        cosines = []
        for feed in Sentences(20, 2):
            expected, actual = session.run(None, feed)[0][0], model(feed)["meaning"][0]
            cosines.append(expected @ actual / np.linalg.norm(expected) / np.linalg.norm(actual))
        assert np.median(cosines) > 0.98


def test_an_npu_gets_the_samples_length_and_a_cpu_and_a_gpu_any(graph: Path, tmp_path: Path) -> None:
    for device, length in (("intel-npu", 20), ("intel-igpu", None), ("intel-cpu", None)):
        lowered = lower(device, graph, Precision.FLOAT16, Filled(8, 1), tmp_path / device)
        assert {spec.name: spec.shape for spec in lowered.inputs} == {"ids": (None, length), "mask": (None, length)}
        assert any("fixed" in note for note in lowered.notes) == (length is not None)
    longest = max(one["ids"].shape[1] for one in Sentences(8, 1))
    lowered = lower("intel-npu", graph, Precision.FLOAT16, Sentences(8, 1), tmp_path / "several")
    assert {spec.file.shape[1] for spec in lowered.inputs} == {longest}
    assert "shorter ones are filled up with zeros" in lowered.notes[0]

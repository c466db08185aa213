"""Lowering by the real FINN+: one partition, estimates against the board, folding, the bundle's files, and exact
equality of the simulator with the tools' own executors."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from tests.support import few_bits, lowering, toolchains
from tests.support.exactness import assert_exact

from kedge_protocol.bundle.config import Verified
from kedge_protocol.errors import LoweringError, TargetError, ToolchainError
from kedge_targets import contract, registry
from kedge_targets.backends.finn import capacity, graph_file, synthesis
from kedge_targets.backends.finn.simulator import Simulator
from kedge_targets.contract import Lowered
from kedge_targets.graph import library, model_writer, qonnx
from kedge_targets.numerics import Plan, Precision, RangeMethod

Array = npt.NDArray[Any]

PLAN = Plan(default=Precision.W4A4, range_method=RangeMethod.MSE)
NOTHING = lowering.Calibration("image", np.zeros((0, 1, 8, 8), dtype=np.float32))
samples_compared = pytest.mark.parametrize("compared", [200, pytest.param(1000, marks=pytest.mark.campaign)])


@pytest.fixture(scope="session", autouse=True)
def _toolchain() -> None:
    toolchains.required("finn")


def lower(model: onnx.ModelProto | Path, folder: Path, target: str = "pynq-z2", **options: Any) -> Lowered:
    path = model
    if not isinstance(path, Path):
        path = folder / "given.onnx"
        folder.mkdir(parents=True, exist_ok=True)
        model_writer.save(model, path)
    return lowering.lower(target, path, PLAN, NOTHING, folder / "lowered", **options)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    return lower(few_bits.network(depthwise=True), tmp_path_factory.mktemp("network"))


def test_the_whole_network_is_one_partition_with_its_cost(lowered: Lowered) -> None:
    assert lowered.verified is Verified.SIMULATED
    assert lowered.precision == "w4a4"
    assert "outside the fabric, on the processor: Transpose (before it)" in lowered.notes
    estimate = lowered.estimate
    assert estimate is not None
    assert estimate.capacity == {"LUT": 53_200, "BRAM_18K": 280, "DSP": 220}
    assert estimate.clock_mhz == 100
    slowest = max(layer.cycles or 0 for layer in estimate.layers)
    assert estimate.frames_per_second == pytest.approx(100e6 / slowest)
    assert estimate.latency_ms == pytest.approx(sum(layer.cycles or 0 for layer in estimate.layers) / 100e3)
    for name, count in estimate.capacity.items():
        used = sum(layer.resources.get(name, 0) for layer in estimate.layers)
        assert used <= capacity.DEFAULT_UTILIZATION * count
    named = {layer.name.partition("(")[2].rstrip(")") for layer in estimate.layers if "(" in layer.name}
    assert named == {"first", "depthwise", "second", "hidden", "scores"}


@samples_compared
def test_the_simulator_is_exact(lowered: Lowered, tmp_path: Path, compared: int) -> None:
    assert_exact(lowered, np.random.default_rng(3).random((compared, 1, 8, 8), dtype=np.float32), tmp_path)


@samples_compared
@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("model", "correct", "precision"), [("tfc_1w1a", 0.9296, "w1a1"), ("tfc_1w2a", 0.9474, "w1a2")]
)
def test_the_zoos_networks_are_exact_and_estimated(
    shared_data: Path, tmp_path: Path, model: str, correct: float, precision: str, compared: int
) -> None:
    with np.load(shared_data / "eval/mnist_t10k_uint8.npz") as arrays:
        samples, labels = arrays["input"].astype(np.float32) / 255, arrays["label"]
    path = shared_data / "models" / f"{model}_qonnx.onnx"
    small = lower(path, tmp_path / "pynq", "pynq-z2")
    large = lower(path, tmp_path / "zcu", "zcu104")
    assert small.precision == precision
    assert "the whole network is in the fabric" in small.notes
    assert small.estimate is not None
    assert large.estimate is not None
    # The wider port of the larger board is what limits there too: twice the words, twice the samples.
    assert large.estimate.frames_per_second == pytest.approx(2 * small.estimate.frames_per_second)
    graph = graph_file.read(small.files[small.entry])
    assert lowering.top1(Simulator(graph).run([samples])[0], labels) == correct
    assert_exact(small, samples[:compared], tmp_path)


def test_a_speed_that_was_asked_for_is_reached_with_less(lowered: Lowered, tmp_path: Path) -> None:
    asked = lower(few_bits.network(depthwise=True), tmp_path, target_fps=20_000)
    assert asked.estimate is not None
    assert lowered.estimate is not None
    assert 20_000 <= asked.estimate.frames_per_second < lowered.estimate.frames_per_second

    def luts(one: contract.Estimate) -> float:
        return sum(layer.resources.get("LUT", 0) for layer in one.layers)

    assert luts(asked.estimate) < luts(lowered.estimate)


def test_an_unreachable_speed_names_the_layer_and_what_can_be_had(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="100000000 frames") as caught:
        lower(few_bits.network(), tmp_path, target_fps=100_000_000)
    assert str(caught.value.where).startswith("layer")
    assert "Ask for at most" in str(caught.value.remedy)
    possible = int(str(caught.value.remedy).split("at most ")[1].split()[0])
    reached = lower(few_bits.network(), tmp_path / "again", target_fps=possible)
    assert reached.estimate is not None
    assert reached.estimate.frames_per_second >= possible


def test_a_board_too_small_names_the_resource(tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match="even its smallest folding takes") as caught:
        lower(few_bits.network(), tmp_path, max_utilization=0.01)
    assert "Pynq-Z2" in str(caught.value)
    assert "max-utilization" in str(caught.value.remedy)


def test_the_same_model_gives_the_same_files(lowered: Lowered, tmp_path: Path) -> None:
    again = lower(few_bits.network(depthwise=True), tmp_path)
    assert lowering.content(again) == lowering.content(lowered)


def test_vivados_machine_gets_the_same_design(lowered: Lowered, tmp_path: Path) -> None:
    """FINN's own flow with the bundle's ``build.yaml``, up to its estimates, comes to the cycles and resources that the
    bundle promises; what follows it needs Vivado."""
    files = lowered.files
    for title in (synthesis.CONFIGURATION, synthesis.FOLDING, synthesis.STREAMLINED):
        shutil.copy(files[title], tmp_path / title)
    script = tmp_path / "flow.py"
    script.write_text(_FLOW)
    installed = toolchains.required("finn")
    ran = subprocess.run(
        [installed.python, script, installed.driver.parent, tmp_path],
        capture_output=True, text=True, timeout=300, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
    for title in ("estimate_layer_cycles.json", "estimate_layer_resources.json"):
        made = json.loads((tmp_path / "build/report" / title).read_text())
        assert made == json.loads(files[title].read_text())
    subprocess.run(["bash", "-n", files[synthesis.SCRIPT]], check=True)


_FLOW = """
import sys
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import driver
driver.Driver(SimpleNamespace(progress=lambda what, done, total: None)).load()
from finn.builder import build_dataflow_steps
from finn.builder.build_dataflow_config import DataflowBuildConfig, estimate_only_dataflow_steps
from qonnx.core.modelwrapper import ModelWrapper
folder = Path(sys.argv[2])
config = DataflowBuildConfig.construct_from(folder / "build.yaml")
config.output_dir = str(folder / "build")
model = ModelWrapper(str(folder / "streamlined.onnx"))
assert config.steps[-1] == "step_deployment_package", config.steps
for step in [step for step in config.steps if step in estimate_only_dataflow_steps]:
    model = getattr(build_dataflow_steps, step)(model, config)
"""


def test_a_bitfile_goes_into_the_bundle_with_its_settings(tmp_path: Path) -> None:
    bit = tmp_path / "mine.bit"
    bit.write_bytes(b"bits")
    bit.with_suffix(".hwh").write_text("<xml/>")
    made = lower(few_bits.network(), tmp_path / "a", bitfile=str(bit))
    assert made.files["finn-accel.bit"].read_bytes() == b"bits"
    assert "finn-accel.hwh" in made.files
    assert made.runtime_options == {"board": "Pynq-Z2", "settings": "settings.json", "bitfile": "finn-accel.bit"}
    shapes = json.loads(made.files["settings.json"].read_text())["driver_information"]["io_shape_dict"]
    assert shapes["ishape_normal"] == [[1, 8, 8, 1]]
    assert shapes["oshape_normal"] == [[1, 10]]
    assert np.prod(shapes["ishape_folded"][0]) == 64


def test_averages_and_the_runtime_agree_with_the_graph(tmp_path: Path) -> None:
    made = lower(few_bits.network(average=True), tmp_path)
    samples = np.random.default_rng(5).random((60, 1, 8, 8), dtype=np.float32)
    runner = lowering.executor("pynq-z2", made)
    graph = graph_file.read(made.files[made.entry])
    (answers,) = runner({"image": samples}).values()
    assert (answers == Simulator(graph).run([samples])[0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_utilization": 0}, "max_utilization"),
        ({"target_fps": -1}, "target_fps"),
        ({"board": "Basys3"}, "Basys3"),
        ({"threads": 4}, "threads"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        lower(few_bits.network(), tmp_path, **options)


def test_without_the_toolchain_the_command_is_told_and_a_bundle_still_simulates(
    lowered: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "empty"))
    missing = registry.compiler("finn").missing()
    assert missing is not None
    assert "kedge toolchain install finn" in missing
    with pytest.raises(ToolchainError, match="kedge toolchain install finn"):
        lower(few_bits.network(), tmp_path)
    samples = np.random.default_rng(6).random((4, 1, 8, 8), dtype=np.float32)
    assert Simulator(graph_file.read(lowered.files[lowered.entry])).run([samples])[0].shape == (4, 10)


def test_an_input_quantizer_of_16_bits_goes_to_the_processor(tmp_path: Path) -> None:
    model = few_bits.network(input_bits=16)
    for node in model.graph.node:
        # As published files have it.
        node.domain = ""
    made = lower(model, tmp_path)
    (spec,) = made.inputs
    assert spec.dtype == "float32"
    assert spec.file is not None
    assert (spec.file.dtype, spec.file.zero_point) == ("uint16", 0)
    assert spec.file.scale == pytest.approx(1 / 65535)
    assert any("on the processor" in note and "16 bits" in note for note in made.notes)
    samples = np.random.default_rng(3).random((32, 1, 8, 8), dtype=np.float32)
    executor = lowering.executor("pynq-z2", made)
    got = np.concatenate([executor({"image": one[None]})[made.outputs[0].name] for one in samples])
    executor.close()
    session = library.load().InferenceSession(
        qonnx.expand_qonnx(few_bits.network(input_bits=16)).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    wanted = np.concatenate([session.run(None, {"image": one[None]})[0] for one in samples])
    # A sum in the middle of two steps may fall to either side.
    assert (got.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.95
    assert np.median(np.abs(got - wanted)) < 1e-5

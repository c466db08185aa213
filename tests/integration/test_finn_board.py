"""A bitfile on a board: FINN's own driver, unmodified, on a stand-in for PYNQ whose registers move the data."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.support import fabric, requirements

from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import ConfigError, VerificationError
from kedge_targets import proof, registry
from kedge_targets.backends.finn import board, graph_file
from kedge_targets.backends.finn.graph_file import Graph
from kedge_targets.backends.finn.simulator import Simulator
from kedge_targets.executor import Executor

pytestmark = pytest.mark.device


class Board:
    """A machine with the fake board."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "pynq.log"

    def did(self) -> list[str]:
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def pynq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Board]:
    requirements.package("finn_plus_driver")
    made = Board(tmp_path)
    for name, value in variables(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(fabric.FAKE))
    yield made
    forget()


def variables(folder: Path) -> dict[str, str]:
    return {
        "FAKE_PYNQ_LOG": str(folder / "pynq.log"),
        "FAKE_PYNQ_STATE": str(folder / "in-fabric"),
        board.LOCK: str(folder / "fabric.lock"),
        "PYTHONPATH": os.pathsep.join([str(fabric.FAKE), *sys.path]),
    }


def forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("pynq", "finn_plus_driver")]:
        del sys.modules[name]


def executor(release: Path) -> tuple[Executor, Path]:
    """The executor of a release's bundle as a device has it, and the folder of its files."""
    layout = Layout(release)
    bundle = layout.bundle("pynq-z2")
    folder = release.parent / "slot"
    folder.mkdir(exist_ok=True)
    for title, layer in bundle.files.items():
        (folder / title).write_bytes(layout.blob_path(layer.digest).read_bytes())
    return Executor.of(folder, bundle.config, cache=release.parent / "cache"), folder


@pytest.fixture
def graph() -> Graph:
    return fabric.convolutional()


def test_the_board_gives_exactly_the_integers_of_the_simulator(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    run, _ = executor(fabric.release(tmp_path / "made", bitstream_of=graph))
    raw = fabric.images(300)
    expected = Simulator(graph).run([raw])[0]
    assert len(np.unique(expected)) > 50
    np.testing.assert_array_equal(run({"image": raw})["scores"], expected)
    np.testing.assert_array_equal(run({"image": raw[:1]})["scores"], expected[:1])
    assert run.detail.startswith("FINN accelerator on Pynq-Z2 at 125 MHz, ")
    run.close()
    assert [line for line in pynq.did() if line.startswith("run")] == ["run 256", "run 256", "run 44", "run 1"]


@pytest.mark.parametrize("fold", [1, 2, 3])
def test_words_of_several_elements_are_packed_as_the_driver_packs_them(
    pynq: Board, graph: Graph, tmp_path: Path, fold: int
) -> None:
    files = fabric.files_of(graph, tmp_path / "made")
    # The pooled image, 2 bits an element, goes in instead of the raw one.
    nodes = tuple(
        graph_file.Node(**{**vars(node), "fabric": node.fabric and index >= 5})
        for index, node in enumerate(graph.nodes)
    )
    late = Graph(graph.inputs, graph.outputs, graph.tensors, nodes, graph.constants)
    files = graph_file.save(late, tmp_path / "made")
    wanted = fabric.settings(late, fold=fold)
    (tmp_path / "made" / fabric.SETTINGS).write_text(json.dumps(wanted))
    fabric.synthesized(late, tmp_path / "made" / fabric.BIT, wanted)
    session = registry.runtime(fabric.BACKEND).load(files[graph_file.GRAPH], fabric.options(bitfile=True))
    raw = fabric.images(9)
    np.testing.assert_array_equal(session.run([raw.astype(np.float32)])[0], Simulator(graph).run([raw])[0])
    session.close()
    assert "run 9" in pynq.did()


def test_a_bitfile_with_one_other_weight_does_not_hold_its_golden_vectors(
    pynq: Board, graph: Graph, tmp_path: Path
) -> None:
    whole, flipped = fabric.convolutional(), fabric.convolutional(flipped=True)
    for made, holds in ((whole, True), (flipped, False)):
        release = fabric.release(tmp_path / str(holds), bitstream_of=made)
        run, folder = executor(release)
        config = Layout(release).bundle("pynq-z2").config
        found, _ = proof.run_vectors(folder, config, run, lambda *_: None)
        run.close()
        assert [deviation.tolerance.max_abs for deviation in found] == [0.0]
        assert all(deviation.holds for deviation in found) is holds


def test_the_throughput_test_runs_once_and_its_figures_are_kept(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    release = fabric.release(tmp_path / "made", bitstream_of=graph)
    first, _ = executor(release)
    first.close()
    assert pynq.did().count("run 256") == 1
    second, folder = executor(release)
    second.close()
    assert "run 256" not in pynq.did()
    assert "samples a second by FINN's throughput test" in second.detail
    config = Layout(release).bundle("pynq-z2").config
    figures = registry.runtime(fabric.BACKEND).prepare(
        folder, config, cache=release.parent / "cache", progress=lambda *_: None
    )["figures"]
    assert figures["batch"] == 256
    assert figures["clock_mhz"] == 125.0
    assert figures["samples_per_second"] > 0
    assert second.figures == figures


def test_two_models_take_turns_in_the_one_fabric(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    other = fabric.convolutional(flipped=True)
    runs = [executor(fabric.release(tmp_path / str(n), bitstream_of=made))[0] for n, made in enumerate((graph, other))]
    pynq.did()
    raw = fabric.images(20)
    for _ in range(2):
        for run, made in zip(runs, (graph, other), strict=True):
            np.testing.assert_array_equal(run({"image": raw})["scores"], Simulator(made).run([raw])[0])
    runs[0]({"image": raw})
    runs[0]({"image": raw})
    for run in runs:
        run.close()
    assert [line.split()[0] for line in pynq.did()] == ["download", "run"] * 5 + ["run"]


def test_another_process_between_two_calls_changes_no_answer(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    run, _ = executor(fabric.release(tmp_path / "mine", bitstream_of=graph))
    raw = fabric.images(5)
    before = run({"image": raw})["scores"]
    other = fabric.files_of(graph, tmp_path / "other", bitstream_of=fabric.convolutional(flipped=True))
    script = f"""
import numpy as np
from pathlib import Path
from kedge_targets import registry
runtime = registry.runtime({fabric.BACKEND!r})
session = runtime.load(Path({str(other[graph_file.GRAPH])!r}), {fabric.options(bitfile=True)})
session.run([np.zeros((1, 1, {fabric.SIZE}, {fabric.SIZE}), np.float32)])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    np.testing.assert_array_equal(run({"image": raw})["scores"], before)
    run.close()


def test_a_bitfile_of_another_part_is_refused(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    files = fabric.files_of(graph, tmp_path / "made", bitstream_of=graph)
    files[fabric.BIT].write_bytes(b"\x00\x09not a zip")
    with pytest.raises(VerificationError, match="the board refuses it: RuntimeError: the bitstream is not for this"):
        registry.runtime(fabric.BACKEND).load(files[graph_file.GRAPH], fabric.options(bitfile=True))


def test_settings_of_another_network_are_refused(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    files = fabric.files_of(graph, tmp_path / "made", bitstream_of=graph)
    wanted = fabric.settings(graph)
    wanted["driver_information"]["io_shape_dict"]["ishape_normal"] = [[1, 8, 8, 1]]
    files[fabric.SETTINGS].write_text(json.dumps(wanted))
    with pytest.raises(VerificationError, match=r"ishape_normal is \(8, 8, 1\), the streamlined graph has \(6, 6, 1\)"):
        registry.runtime(fabric.BACKEND).load(files[graph_file.GRAPH], fabric.options(bitfile=True))
    files[fabric.SETTINGS].write_text("{")
    with pytest.raises(VerificationError, match=r"settings\.json: is not the settings of FINN's driver"):
        registry.runtime(fabric.BACKEND).load(files[graph_file.GRAPH], fabric.options(bitfile=True))


@pytest.mark.parametrize("there", ["bitfile without a board", "no device", "no bitfile"])
def test_what_cannot_run_on_the_board_is_simulated_and_says_so(
    graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    if there == "no device":
        monkeypatch.setenv("FAKE_PYNQ_DEVICES", "0")
        monkeypatch.syspath_prepend(str(fabric.FAKE))
    release = fabric.release(tmp_path / "made", bitstream_of=None if there == "no bitfile" else graph)
    run, _ = executor(release)
    forget()
    raw = fabric.images(10)
    np.testing.assert_array_equal(run({"image": raw})["scores"], Simulator(graph).run([raw])[0])
    said = {
        "bitfile without a board": "numpy instead of Pynq-Z2: PYNQ cannot be loaded (ModuleNotFoundError",
        "no device": "numpy instead of Pynq-Z2: PYNQ finds no device",
        "no bitfile": "numpy: the bundle has no bitfile for Pynq-Z2",
    }[there]
    assert run.detail.startswith("simulated bit for bit in numpy")
    assert said in run.detail


def test_the_driver_runs_where_there_is_no_onnx(pynq: Board, graph: Graph, tmp_path: Path) -> None:
    """No wheel of onnx exists for a 32-bit ARM."""
    files = fabric.files_of(graph, tmp_path / "made", bitstream_of=graph)
    script = f"""
import sys
class NoOnnx:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("onnx", "onnxruntime"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoOnnx())
import numpy as np
from pathlib import Path
from kedge_targets import registry
runtime = registry.runtime({fabric.BACKEND!r})
session = runtime.load(Path({str(files[graph_file.GRAPH])!r}), {fabric.options(bitfile=True)})
assert session.detail.startswith("FINN accelerator"), session.detail
session.run([np.zeros((1, 1, {fabric.SIZE}, {fabric.SIZE}), np.float32)])
assert "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
    assert "run 1" in pynq.did()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speed": 3}, "unknown runtime option 'speed'"),
        ({"bitfile": "a.bit"}, "a bitfile needs settings"),
        ({"bitfile": "../a.bit", "settings": "s.json"}, "is no name of a file"),
        ({"settings": 3}, "is no name of a file"),
    ],
)
def test_wrong_options_are_named(graph: Graph, tmp_path: Path, options: dict[str, object], message: str) -> None:
    files = fabric.files_of(graph, tmp_path)
    with pytest.raises(ConfigError, match=message):
        registry.runtime(fabric.BACKEND).load(files[graph_file.GRAPH], options)

"""The simulator of programmable logic beside the tools' own executors, integer by integer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.backends.finn import graph_file, synthesis, toolchain_client
from kedge_targets.backends.finn.graph_file import Graph
from kedge_targets.backends.finn.simulator import Simulator
from kedge_targets.contract import Lowered

Array = npt.NDArray[Any]


def executed(model: Path, samples: Array, folder: Path, dialect: str) -> Array:
    np.save(folder / "samples.npy", samples)
    request = toolchain_client.ExecuteRequest(
        model=str(model), samples=str(folder / "samples.npy"), answers=str(folder / "answers.npy"), dialect=dialect
    )
    assert toolchain_client.execute(request, len(samples)).samples == len(samples)
    answers: Array = np.load(folder / "answers.npy")
    return answers


def integers(answers: Array, graph: Graph) -> Array:
    """The last layer's sums: what is added and multiplied behind it taken back, rounded, and seen to be integers."""
    values = answers.astype(np.float64)
    for node in reversed(graph.nodes):
        if node.operator not in ("Add", "Mul"):
            break
        (constant,) = (graph.constants[name].astype(np.float64) for name in node.inputs if name in graph.constants)
        values = values - constant if node.operator == "Add" else values / constant
    whole: Array = np.rint(values)
    np.testing.assert_allclose(values, whole, atol=0.01)
    return whole


def assert_exact(lowered: Lowered, samples: Array, folder: Path) -> None:
    """The simulator, qonnx's executor on the QONNX graph, and FINN's on the streamlined graph and the hardware layers
    compute the same integers. FINN's own even give the same floats; qonnx scales in another order: a sum halfway
    between two levels may fall to the other side, seen for one sample in a thousand."""
    graph = graph_file.read(lowered.files[lowered.entry])
    simulated = Simulator(graph).run([samples])[0]
    build = lowered.files[synthesis.MODEL].parent / "build"
    assert (
        executed(build / "hardware.onnx", samples, folder, toolchain_client.FINN).reshape(simulated.shape) == simulated
    ).all()
    few = samples[:100]
    streamlined = executed(build / "streamlined.onnx", few, folder, toolchain_client.FINN).reshape(len(few), -1)
    assert (streamlined == simulated[:100]).all()
    given = executed(lowered.files[synthesis.MODEL], samples, folder, toolchain_client.QONNX).reshape(simulated.shape)
    same = (integers(given, graph) == integers(simulated, graph)).reshape(len(samples), -1).all(axis=1)
    assert same.mean() >= 0.99

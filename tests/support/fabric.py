"""Small networks for an FPGA: streamlined graphs, "bitfiles" for the fake board, bundles."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import golden
from kedge_protocol.bundle import config as cfg
from kedge_targets.backends.finn import graph_file
from kedge_targets.backends.finn.graph_file import Graph, Node, Tensor
from kedge_targets.backends.finn.simulator import Simulator
from tests.support.bundles import Packed, write_bundle

Array = npt.NDArray[Any]

FAKE = Path(__file__).parent / "fake_pynq"
BACKEND = "finn"
BIT, SETTINGS = "finn-accel.bit", "settings.json"
SIZE, CLASSES = 6, 5
"""Of :func:`convolutional`: input ``image`` [N, 1, 6, 6] of UINT8, output ``scores`` [N, 5]."""


class Builder:
    """A graph, node by node; each method gives the name of what the node makes."""

    def __init__(self, shape: Sequence[int], datatype: str, *, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.tensors = {"in": Tensor(shape=(1, *shape), datatype=datatype)}
        self.nodes: list[Node] = []
        self.constants: dict[str, Array] = {}

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = np.asarray(value, dtype=dtype)
        return name

    def node(
        self, operator: str, inputs: Sequence[str], shape: Sequence[int], datatype: str = "FLOAT32", **attributes: Any
    ) -> str:
        name = f"t{len(self.nodes)}"
        self.tensors[name] = Tensor(shape=(1, *shape), datatype=datatype)
        self.nodes.append(
            Node(
                name=f"{operator}_{len(self.nodes)}",
                operator=operator,
                inputs=tuple(inputs),
                outputs=(name,),
                attributes=attributes,
            )
        )
        return name

    def graph(self, output: str, *, fabric: Sequence[int] = ()) -> Graph:
        nodes = tuple(replace(node, fabric=index in fabric) for index, node in enumerate(self.nodes))
        return Graph(("in",), (output,), self.tensors, nodes, self.constants)


def convolutional(*, seed: int = 0, flipped: bool = False) -> Graph:
    """Transposition, a padded 3x3 convolution with 4 channels of 2-bit weights, thresholds, pooling, a matrix, a scale;
    all but the transposition is the accelerator.

    Args:
        seed: of the weights.
        flipped: one weight of the first layer has another sign.
    """
    make = Builder((1, SIZE, SIZE), "UINT8", seed=seed)
    weights = make.random.choice([-1.0, 1.0], size=(9, 4))
    if flipped:
        weights[4, 0] *= -1
    x = make.node("Transpose", ["in"], (SIZE, SIZE, 1), "UINT8", perm=[0, 2, 3, 1])
    x = make.node("Im2Col", [x], (SIZE, SIZE, 9), "UINT8", kernel_size=[3, 3], stride=[1, 1], pad_amount=[1, 1, 1, 1])
    x = make.node("MatMul", [x, make.constant(weights)], (SIZE, SIZE, 4), "INT32")
    steps = np.sort(make.random.normal(scale=300, size=(4, 3)), axis=1)
    x = make.node(
        "MultiThreshold", [x, make.constant(steps)], (SIZE, SIZE, 4), "UINT2", out_dtype="UINT2", data_layout="NHWC"
    )
    x = make.node("MaxPoolNHWC", [x], (3, 3, 4), "UINT2", kernel_shape=[2, 2], strides=[2, 2], pads=[0, 0, 0, 0])
    x = make.node("Reshape", [x, make.constant([1, -1], np.int64)], (36,), "UINT2")
    x = make.node("MatMul", [x, make.constant(make.random.integers(-3, 4, (36, CLASSES)))], (CLASSES,), "INT32")
    x = make.node("Mul", [x, make.constant([0.03125 * 1.3])], (CLASSES,))
    return make.graph(x, fabric=range(1, 8))


def images(count: int, *, seed: int = 7) -> Array:
    """Raw samples of :func:`convolutional`, uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, 1, SIZE, SIZE)).astype(np.uint8)


def in_fabric(graph: Graph) -> Graph:
    """The part of a graph that is the accelerator."""
    nodes = tuple(node for node in graph.nodes if node.fabric)
    made = {name for node in nodes for name in node.outputs}
    given = {name for node in nodes for name in node.inputs} - made - set(graph.constants)
    read = {name for node in graph.nodes if not node.fabric for name in node.inputs} | set(graph.outputs)
    used = {name for node in nodes for name in node.inputs}
    constants = {name: value for name, value in graph.constants.items() if name in used}
    return replace(graph, inputs=tuple(given), outputs=tuple(made & read), nodes=nodes, constants=constants)


def settings(graph: Graph, *, fold: int = 1) -> dict[str, Any]:
    """``settings.json`` as FINN writes it, ``fold`` elements a word."""
    part = in_fabric(graph)
    shapes: dict[str, Any] = {}
    for side, (name,) in (("i", part.inputs), ("o", part.outputs)):
        tensor = graph.tensors[name]
        inner = fold if tensor.shape[-1] % fold == 0 else 1
        bits = {"FLOAT32": 32, "UINT8": 8, "UINT2": 2}[tensor.datatype]
        folded = [*tensor.shape[:-1], tensor.shape[-1] // inner, inner]
        shapes |= {
            f"{side}dt": [f"DataType['{tensor.datatype}']"],
            f"{side}shape_normal": [list(tensor.shape)],
            f"{side}shape_folded": [folded],
            f"{side}shape_packed": [[*folded[:-1], (inner * bits + 7) // 8]],
        }
    shapes |= {"idma_names": ["idma0"], "odma_names": ["odma0"], "num_inputs": 1, "num_outputs": 1}
    information = {
        "driver_type": "FINNDMAOverlay",
        "io_shape_dict": shapes,
        "platform": "zynq-iodma",
        "fclk_mhz": 100.0,
    }
    return {"driver_information": information, "experiment_information": {}}


def synthesized(graph: Graph, path: Path, wanted: dict[str, Any]) -> Path:
    """Write a "bitfile" of a graph's accelerator for the fake board, with its ``.hwh`` beside.

    Args:
        graph: with nodes in the fabric.
        path: of the ``.bit``.
        wanted: ``settings.json`` of it.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path, "w") as archive:
        for title, file in graph_file.save(in_fabric(graph), Path(folder)).items():
            archive.write(file, title)
        archive.writestr("io.json", json.dumps(wanted["driver_information"]["io_shape_dict"]))
    path.with_suffix(".hwh").write_text(
        '<EDKSYSTEM><MODULES><MODULE INSTANCE="clk_wiz_0"><PARAMETERS>'
        '<PARAMETER NAME="CLKOUT1_OUT_FREQ" VALUE="125.0"/></PARAMETERS></MODULE></MODULES></EDKSYSTEM>'
    )
    return path


def files_of(graph: Graph, folder: Path, *, bitstream_of: Graph | None = None) -> dict[str, Path]:
    """A bundle's files, title → path; with a "bitfile" of ``bitstream_of`` where one is given."""
    files = graph_file.save(graph, folder)
    files[SETTINGS] = folder / SETTINGS
    files[SETTINGS].write_text(json.dumps(settings(graph)))
    if bitstream_of is not None:
        files[BIT] = synthesized(bitstream_of, folder / BIT, settings(bitstream_of))
        files["finn-accel.hwh"] = folder / "finn-accel.hwh"
    return files


def options(*, bitfile: bool) -> dict[str, Any]:
    """Options of the runtime."""
    found = {"board": "Pynq-Z2", "settings": SETTINGS}
    return {**found, "bitfile": BIT} if bitfile else found


def release(
    folder: Path,
    *,
    name: str = "small",
    version: str = "1.0",
    target: str = "pynq-z2",
    bitstream_of: Graph | None = None,
) -> Path:
    """A release of :func:`convolutional`; its golden vectors are the simulator's, and allow nothing."""
    graph = convolutional()
    folder.mkdir(parents=True, exist_ok=True)
    raw = images(8)
    expected = Simulator(graph).run([raw])[0]
    packed = Packed(
        backend=BACKEND,
        files=files_of(graph, folder, bitstream_of=bitstream_of),
        entry=graph_file.GRAPH,
        inputs=(_spec("image", "in", graph.tensors["in"].shape),),
        outputs=(_spec("scores", graph.outputs[0], graph.tensors[graph.outputs[0]].shape),),
        vectors=golden.Golden({"image": raw}, {"scores": expected}, {"scores": golden.Tolerance(0.0, 0.0)}),
        runtimes=(
            cfg.RuntimeRequirement(distribution="finn-plus-driver", minimum="1.6.1"),
            cfg.RuntimeRequirement(distribution="numpy", minimum="1.21"),
        ),
        runtime_options=options(bitfile=bitstream_of is not None),
        kernel_sets=("simulator",),
        precision="w2a2",
    )
    return write_bundle(folder / "OUT", packed, name=name, version=version, target=target)


def _spec(name: str, in_file: str, shape: tuple[int, ...]) -> cfg.TensorSpec:
    file = cfg.FileTensor(name=in_file, index=0, shape=(None, *shape[1:]), dtype="float32")
    return cfg.TensorSpec(name=name, shape=(None, *shape[1:]), dtype="float32", file=file)

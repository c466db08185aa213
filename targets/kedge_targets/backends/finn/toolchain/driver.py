"""Converts QONNX to a dataflow accelerator and its estimates with FINN+, in the toolchain's own environment: standard
library and vendor stack only, never Kedge. No Vivado is needed or used.

Speaks the worker's protocol (docs/architecture.md): one JSON request per line on standard input, JSON lines of progress
and one answer on the file descriptor ``KEDGE_ANSWER_FD``. Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``build``
    ``{"graph", "folder", "board", "clock_mhz", "limits", "target_fps", "input_types", "standalone_thresholds"}`` → see
    :meth:`Driver.build`. ``graph`` is a QONNX file with fixed shapes; ``limits`` is resource → largest amount that may
    be used; without ``target_fps`` the fastest folding that fits is searched; ``input_types`` names FINN's data type of
    an input (``UINT8``).
``execute``
    ``{"model", "samples", "answers", "dialect"}`` → ``{"samples", "seconds"}``: run a model with the tools' own
    executors, sample by sample (``dialect`` ``qonnx`` or ``finn``); ``samples`` and ``answers`` are ``.npy`` files.

An error's ``kind`` is the name of a class in Kedge's hierarchy of errors.
"""

import atexit
import contextlib
import copy
import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "toolchain" / "driver_side"))

import driver_loop
import flow
import folding
import input_thresholds

PACKAGES = ("finn-plus", "qonnx", "onnx")

# Up to the partition, then what folding and estimates need; FINN's own order.
TO_STREAMLINED = ("step_qonnx_to_finn", "step_tidy_up", "step_streamline")
TO_HARDWARE = ("step_convert_to_hw", "step_minimize_bit_width_initial")
FOLDED = (
    "PE", "SIMD", "EmbFold", "SeqFold", "parallel_window", "ram_style", "ram_style_thresholds", "ram_style_mask",
    "depth", "impl_style", "resType", "mac_resource", "mem_mode", "runtime_writeable_weights", "depth_trigger_uram",
    "depth_trigger_bram",
)  # fmt: skip

# FINN wants to know the version of a Vivado that it never calls here.
_NO_VIVADO = "/nonexistent/Vivado/2024.2"


class Driver:
    """The state of the loop: the answer channel, and whether the stack is loaded."""

    def __init__(self, answers):
        self.progress = answers.progress
        self._loaded = False

    def load(self):
        """Load the stack, once, after setting the folder that FINN builds in, a Vivado version, and the missing
        simulator."""
        if not self._loaded:
            os.environ["XILINX_VIVADO"] = _NO_VIVADO
            building = tempfile.mkdtemp(prefix="kedge-fpga-")
            atexit.register(shutil.rmtree, building, ignore_errors=True)
            os.environ["FINN_BUILD_DIR"] = building
            _without_torch()
            import finn.xsi

            for name in finn.xsi._LAZY_NAMES:
                setattr(finn.xsi, name, None)
            from finn.util.settings import initialize_dummy_settings

            initialize_dummy_settings()
            import finn.builder.build_dataflow_steps

            self._loaded = True

    def version(self, request):
        """Load the stack and return its versions."""
        self.load()
        return driver_loop.versions(PACKAGES)

    def build(self, request):
        """Map a graph to the fabric, fold it, and estimate its cost.

        Returns:
            ``streamlined``, ``hardware``, ``parent``, ``child``: ONNX files; ``folding``: JSON; ``reports``: FINN's
            own JSON files; ``outside``: ``{"name", "operator", "place"}`` of nodes outside the partition; ``fold``: see
            :mod:`folding`; ``fits``, ``tries``, ``fastest`` (of all that was tried), ``settings`` (of the board's
            driver), ``part``, ``steps`` (of FINN's flow, from the streamlined graph to the bitfile), ``seconds``.
        """
        self.load()
        from qonnx.core.modelwrapper import ModelWrapper

        folder = Path(request["folder"])
        config = flow.configuration(request, folder)
        seconds = {}
        with _timed(seconds, "streamline"):
            self.progress("streamlining", 0, 0)
            model = ModelWrapper(request["graph"])
            for name, datatype in request["input_types"].items():
                _annotate(model, name, datatype)
            rounding = input_thresholds.rounding_of_inputs(model)
            model = flow.through(TO_STREAMLINED, model, config)
            input_thresholds.make_exact(model, rounding)
            model.save(str(folder / "streamlined.onnx"))
        with _timed(seconds, "partition"):
            self.progress("hardware layers", 0, 0)
            model = flow.through(TO_HARDWARE, model, config)
            model.save(str(folder / "hardware.onnx"))
            outside = _outside(model)
            if any(item["place"] == "between" for item in outside) or len(outside) == len(model.graph.node):
                return {"outside": outside, "seconds": seconds}
            child = flow.through(("step_create_dataflow_partition", "step_specialize_layers"), model, config)
        with _timed(seconds, "fold"):
            found = folding.Folding(child, config, request["limits"], self.progress).found(request.get("target_fps"))
        with _timed(seconds, "report"):
            return {**self._reported(found, config, folder), "outside": outside, "seconds": seconds}

    def _reported(self, found, config, folder):
        from finn.util.config import extract_model_config_to_json

        model = found.best.model
        model.save(str(folder / "dataflow_child.onnx"))
        extract_model_config_to_json(model, folder / "folding.json", list(FOLDED))
        # FINN's own reports; its step annotates the model and changes nothing that is computed.
        flow.through(("step_generate_estimate_reports",), copy.deepcopy(model), config)
        return {
            "streamlined": str(folder / "streamlined.onnx"),
            "hardware": str(folder / "hardware.onnx"),
            "parent": str(folder / "intermediate_models" / "dataflow_parent.onnx"),
            "child": str(folder / "dataflow_child.onnx"),
            "folding": str(folder / "folding.json"),
            "reports": sorted(str(path) for path in (folder / "report").glob("estimate_*.json")),
            "fold": found.best.cost,
            "fits": found.fits,
            "fastest": found.fastest.cost,
            "tries": found.tries,
            "settings": _settings(model, config),
            "part": config._resolve_fpga_part(),
            "steps": flow.steps_after(TO_STREAMLINED[-1]),
        }

    def execute(self, request):
        """Run a model sample by sample."""
        self.load()
        import numpy
        from finn.core import onnx_exec as finn_exec
        from qonnx.core import onnx_exec as qonnx_exec
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.util.cleanup import cleanup_model

        run = {"qonnx": qonnx_exec.execute_onnx, "finn": finn_exec.execute_onnx}[request["dialect"]]
        model = ModelWrapper(request["model"])
        if request["dialect"] == "qonnx":
            model = cleanup_model(model)
        given, answer = model.graph.input[0].name, model.graph.output[0].name
        shape = model.get_tensor_shape(given)
        samples = numpy.load(request["samples"], mmap_mode="r")
        answers = []
        begun = time.perf_counter()
        for index in range(len(samples)):
            sample = numpy.asarray(samples[index : index + 1], dtype=numpy.float32).reshape(shape)
            answers.append(run(model, {given: sample})[answer])
            self.progress("executing", index + 1, len(samples))
        seconds = time.perf_counter() - begun
        numpy.save(request["answers"], numpy.concatenate(answers))
        return {"samples": len(samples), "seconds": seconds}


def _without_torch():
    """Import FINN's LayerNorm module with a placeholder for torch. FINN imports torch only to execute a LayerNorm,
    which none of our accelerators has; the placeholder is removed before anything else imports torch."""
    import scipy.special  # noqa: F401 -- it would ask the placeholder for its tensors

    names = ("torch", "torch.nn", "torch.nn.functional")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    try:
        import finn.custom_op.fpgadataflow.layernorm  # noqa: F401
    finally:
        for name in names:
            del sys.modules[name]


def _annotate(model, name, datatype):
    from qonnx.core.datatype import DataType

    model.set_tensor_datatype(name, DataType[datatype])


def _outside(model):
    """Return the nodes without a hardware layer, and whether they are before, behind or between hardware layers."""
    inside = [node.domain.startswith("finn.custom_op.fpgadataflow") for node in model.graph.node]
    first = inside.index(True) if True in inside else len(inside)
    last = len(inside) - inside[::-1].index(True) if True in inside else 0
    found = []
    for index, (node, converted) in enumerate(zip(model.graph.node, inside, strict=True)):
        if not converted:
            place = "before" if index < first else "behind" if index >= last else "between"
            constant = [name for name in node.input if model.get_initializer(name) is not None]
            found.append({"name": node.name, "operator": node.op_type, "place": place, "weights": len(constant)})
    return found


def _settings(model, config):
    """Return the board driver's settings, as FINN's ``MakePYNQDriver`` writes them once the DMA is in the design; the
    names are those that FINN gives to one input and one output."""
    first, last = model.graph.node[0], model.graph.node[-1]
    from qonnx.custom_op.registry import getCustomOp

    inputs = _ends(model, model.graph.input[0].name, getCustomOp(first).get_folded_input_shape())
    outputs = _ends(model, model.graph.output[0].name, getCustomOp(last).get_folded_output_shape())
    shapes = {f"i{name}": [value] for name, value in inputs.items()}
    shapes |= {f"o{name}": [value] for name, value in outputs.items()}
    return {
        "driver_information": {
            "driver_type": "FINNDMAOverlay",
            "io_shape_dict": {
                **shapes,
                "idma_names": ["idma0"],
                "odma_names": ["odma0"],
                "num_inputs": 1,
                "num_outputs": 1,
                "number_of_external_weights": 0,
                "external_weights_input_shapes": {},
            },
            "external_weights": False,
            "runtime_weights": False,
            "platform": config._resolve_driver_platform(),
            "fclk_mhz": 1000.0 / config.synth_clk_period_ns,
        },
        "experiment_information": {},
    }


def _ends(model, tensor, folded):
    from finn.util.data_packing import finnpy_to_packed_bytearray
    from qonnx.util.basic import gen_finn_dt_tensor

    datatype = model.get_tensor_datatype(tensor)
    packed = finnpy_to_packed_bytearray(gen_finn_dt_tensor(datatype, folded), datatype).shape
    return {
        "dt": f"DataType['{datatype.name}']",
        "shape_normal": [int(size) for size in model.get_tensor_shape(tensor)],
        "shape_folded": [int(size) for size in folded],
        "shape_packed": [int(size) for size in packed],
    }


@contextlib.contextmanager
def _timed(seconds, name):
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] = time.perf_counter() - begun


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver = Driver(answers)
    driver_loop.serve(answers, {"version": driver.version, "build": driver.build, "execute": driver.execute})


if __name__ == "__main__":
    main()

"""Lowers models for FPGAs: a QONNX graph of few bits, mapped to one dataflow partition by FINN+ and folded for a board,
and its streamlined integer graph for the simulator.

No bitfile is made here, since that takes Vivado and hours: the bundle carries everything that a machine with Vivado
needs for it, and the bitfile itself once the user has it (option ``bitfile``).
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.bundle.config import FileTensor, RuntimeRequirement, TensorSpec, Verified
from kedge_protocol.errors import LoweringError, TargetError
from kedge_targets.backends.finn import (
    bitfile,
    capacity,
    convertibility,
    graph_file,
    precisions,
    quantization,
    synthesis,
    toolchain_client,
)
from kedge_targets.backends.finn.toolchain_client import Built, Cost, HardwareLayer
from kedge_targets.backends.finn.wide_inputs import WideInput
from kedge_targets.compiler_template import CompilerTemplate, LoweringJob
from kedge_targets.contract import Estimate, LayerCost, Lowered
from kedge_targets.graph import library, model_writer, signature
from kedge_targets.numerics import Numerics, Precision, QuantizationScheme, RangeMethod
from kedge_targets.target import Target

if TYPE_CHECKING:
    import onnx

_RUNTIMES = (("finn-plus-driver", "1.6.1"), ("numpy", "1.23.2"))
_REQUIREMENTS = frozenset({"target_fps", "max_utilization", "bitfile"})
_KNOWN_OPTIONS = _REQUIREMENTS | {"board", "clock_mhz", "standalone_thresholds", "input_datatype"}
_DEFAULT_CLOCK_MHZ = 100.0
_REPORTS = ("estimate_layer_cycles.json", "estimate_layer_resources.json", "estimate_network_performance.json")
_UNITS = ("MVAU", "VVAU")


class Compiler(CompilerTemplate):
    """Compiles with FINN+, up to its estimates.

    Options of a target's file:
        board: FINN's name of the board (``Pynq-Z2``).
        clock_mhz: clock of the design; 100 by default.
        standalone_thresholds: build thresholds separately from the matrix units, so that these may be RTL on DSPs.
        input_datatype: FINN's name (``UINT8``) of the model input's type, if a QONNX model takes integers without a
            quantizer of its own.

    Options of one compilation:
        target_fps: samples per second that the design must reach; without it the fastest that fits is searched.
        max_utilization: share of each of the chip's resources that the estimate may use
            (:data:`kedge_targets.backends.finn.capacity.DEFAULT_UTILIZATION`).
        bitfile: path of a finished ``.bit`` with its ``.hwh`` beside it.
    """

    tools = "FINN's tools"
    no_decoders = "a circuit holds a whole network of few bits, and a language model does not fit"
    toolchain = toolchain_client.NAME
    known_options = _KNOWN_OPTIONS

    requirements = _REQUIREMENTS

    @property
    def numerics(self) -> Numerics:
        """See :meth:`kedge_targets.contract.Compiler.numerics`."""
        return Numerics(
            precisions=(Precision.W2A2, Precision.W3A3, Precision.W4A4, Precision.W8A8),
            schemes=(),
            mixed=True,
            layouts=("NCHW",),
            range_methods=(RangeMethod.MSE, RangeMethod.MIN_MAX, RangeMethod.PERCENTILE, RangeMethod.ENTROPY),
            fixed_ranges=True,
            quantized_graphs=True,
        )

    def require_tools(self) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.require_tools`."""
        library.load()
        super().require_tools()

    def verification(self, target: Target) -> Verified:
        """See :meth:`kedge_targets.contract.Compiler.verification`."""
        return Verified.SIMULATED

    def quantized_for(self, target: Target) -> tuple[QuantizationScheme, ...]:
        """See :meth:`kedge_targets.contract.Compiler.quantized_for`."""
        return ()

    def check(self, job: LoweringJob) -> None:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.check`."""
        _Settings.of(job.options, where=f"target {job.target.name}")

    def lower_job(self, job: LoweringJob) -> Lowered:
        """See :meth:`kedge_targets.compiler_template.CompilerTemplate.lower_job`."""
        workdir = job.workdir
        settings = _Settings.of(job.options, where=f"target {job.target.name}")
        toolchain_client.start()
        begun = time.perf_counter()
        ready = quantization.quantize_graph(
            job.graph, job.plan, job.calibration, workdir=workdir, input_type=settings.input_datatype
        )
        seconds = {"quantize": time.perf_counter() - begun}
        title = synthesis.MODEL
        model_writer.strip(ready.model, keep_shapes=True)
        model_writer.save(ready.model, workdir / title)
        settings = settings.with_input(ready.wide)
        built = toolchain_client.build(settings.request(workdir / title, workdir / "build", ready.model))
        notes = [*ready.notes, *convertibility.judge(built.outside)]
        named = _named(built, convertibility.weighted(ready.model))
        cost = settings.require(named)
        streamlined, files = _simulated(named, workdir)
        files |= {title: workdir / title} | _for_vivado(named, settings, workdir)
        files |= settings.with_bitfile(named, workdir)
        return Lowered(
            files=files,
            entry=graph_file.GRAPH,
            inputs=_specs(signature.inputs(ready.given), streamlined.graph.input, ready.wide),
            outputs=_specs(signature.outputs(ready.given), streamlined.graph.output),
            runtimes=tuple(RuntimeRequirement(distribution=name, minimum=minimum) for name, minimum in _RUNTIMES),
            verified=Verified.SIMULATED,
            tools=toolchain_client.versions(),
            runtime_options=settings.runtime_options(),
            seconds=seconds | built.seconds,
            notes=(*notes, *_fold_notes(cost, built.tries, settings)),
            calibration_samples=ready.samples,
            estimate=_estimate(cost, settings),
            precision=precisions.of(ready.model) if ready.taken else "",
        )


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """Checked options."""

    board: str
    clock_mhz: float
    standalone_thresholds: bool
    input_datatype: str | None
    target_fps: float | None
    max_utilization: float
    bitfile: Path | None
    chip: capacity.Board

    @classmethod
    def of(cls, options: Mapping[str, Any], *, where: str) -> _Settings:
        if "board" not in options:
            raise TargetError(
                "does not say which board it is",
                where=where,
                remedy=f"Give the option board, one of {', '.join(capacity.boards())}",
            )
        utilization = options.get("max_utilization")
        utilization = capacity.DEFAULT_UTILIZATION if utilization is None else utilization
        for name, value, most in (
            ("clock_mhz", options.get("clock_mhz", _DEFAULT_CLOCK_MHZ), 1000.0),
            ("target_fps", options.get("target_fps"), float("inf")),
            ("max_utilization", utilization, 1.0),
        ):
            fine = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= most
            if value is not None and not fine:
                raise TargetError(f"option {name} = {value!r} is no number above 0 and up to {most:g}", where=where)
        given = options.get("bitfile")
        return cls(
            board=options["board"],
            clock_mhz=float(options.get("clock_mhz", _DEFAULT_CLOCK_MHZ)),
            standalone_thresholds=bool(options.get("standalone_thresholds", False)),
            input_datatype=options.get("input_datatype"),
            target_fps=options.get("target_fps"),
            max_utilization=float(utilization),
            bitfile=None if given is None else Path(given),
            chip=capacity.board(options["board"], where=where),
        )

    @property
    def limits(self) -> dict[str, float]:
        return self.chip.limits(self.max_utilization)

    def with_input(self, wide: WideInput | None) -> _Settings:
        """Return the settings for a fabric that receives the integers of a wide quantizer."""
        return self if wide is None else dataclasses.replace(self, input_datatype=wide.datatype)

    def request(self, graph: Path, folder: Path, model: onnx.ModelProto) -> toolchain_client.BuildRequest:
        folder.mkdir()
        given = model.graph.input[0].name
        return toolchain_client.BuildRequest(
            graph=str(graph),
            folder=str(folder),
            board=self.board,
            clock_mhz=self.clock_mhz,
            limits=self.limits,
            target_fps=self.target_fps,
            input_types={} if self.input_datatype is None else {given: self.input_datatype},
            standalone_thresholds=self.standalone_thresholds,
        )

    def require(self, built: Built) -> Cost:
        """Raise LoweringError unless the design fits and is fast enough."""
        if built.fold is None or built.fastest is None:
            raise LoweringError("FINN brought no layer into the fabric", remedy="See docs/fpga.md for what converts")
        capacity.require(
            built.fold,
            built.fastest,
            fits=built.fits,
            board_name=self.board,
            limits=self.limits,
            utilization=self.max_utilization,
            target_fps=self.target_fps,
        )
        return built.fold

    def with_bitfile(self, built: Built, workdir: Path) -> dict[str, Path]:
        """Return the driver's settings, and the bitfile if there is one."""
        files = {bitfile.SETTINGS: workdir / bitfile.SETTINGS}
        settings = built.settings
        if self.bitfile is not None:
            settings = bitfile.settings_for(self.bitfile, built.settings)
            files |= bitfile.copied(self.bitfile, workdir)
        files[bitfile.SETTINGS].write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return files

    def runtime_options(self) -> dict[str, Any]:
        found: dict[str, Any] = {"board": self.board, "settings": bitfile.SETTINGS}
        return found if self.bitfile is None else {**found, "bitfile": bitfile.BIT}


def _named(built: Built, weighted: Sequence[str]) -> Built:
    """Return the same with the user's layer names at their matrix units, if their numbers match."""

    def renamed(cost: Cost | None) -> Cost | None:
        if cost is None:
            return None
        units = [layer.name for layer in cost.layers if layer.operator.startswith(_UNITS)]
        if len(units) != len(weighted):
            return cost
        names = {unit: f"{unit} ({name})" for unit, name in zip(units, weighted, strict=True)}
        layers = tuple(dataclasses.replace(layer, name=names.get(layer.name, layer.name)) for layer in cost.layers)
        return dataclasses.replace(cost, layers=layers, bottleneck=names.get(cost.bottleneck, cost.bottleneck))

    return dataclasses.replace(built, fold=renamed(built.fold), fastest=renamed(built.fastest))


def _simulated(built: Built, workdir: Path) -> tuple[onnx.ModelProto, dict[str, Path]]:
    """Return the streamlined graph, and the simulator's files for it."""
    import onnx

    streamlined = onnx.load_model(built.streamlined)
    before, behind = (
        [node.operator for node in built.outside if node.place == place] for place in ("before", "behind")
    )
    return streamlined, graph_file.written(streamlined, workdir / "simulated", before=before, behind=behind)


def _for_vivado(built: Built, settings: _Settings, workdir: Path) -> dict[str, Path]:
    """Return the folding, FINN's own reports, and what is needed to build the bitfile."""
    files = {Path(path).name: Path(path) for path in built.reports if Path(path).name in _REPORTS}
    files[synthesis.FOLDING] = workdir / synthesis.FOLDING
    shutil.copyfile(built.folding, files[synthesis.FOLDING])
    files[synthesis.STREAMLINED] = workdir / synthesis.STREAMLINED
    shutil.copyfile(built.streamlined, files[synthesis.STREAMLINED])
    return files | synthesis.written(
        workdir,
        board=settings.board,
        clock_mhz=settings.clock_mhz,
        standalone_thresholds=settings.standalone_thresholds,
        steps=built.steps,
        version=toolchain_client.versions()["finn-plus"],
    )


def _specs(
    given: list[signature.TensorInfo], in_file: Sequence[Any], wide: WideInput | None = None
) -> tuple[TensorSpec, ...]:
    """Return the model's tensors; the simulator takes any number of samples at once."""
    made = []
    for index, (info, value) in enumerate(zip(given, in_file, strict=True)):
        sizes = [axis.dim_value for axis in value.type.tensor_type.shape.dim]
        file = FileTensor(name=value.name, index=index, shape=(None, *sizes[1:]), dtype="float32")
        if wide is not None:
            file = dataclasses.replace(file, dtype=wide.dtype, scale=wide.scale, zero_point=0)
        made.append(TensorSpec(name=info.name, shape=info.shape, dtype=info.dtype, layout=info.layout, file=file))
    return tuple(made)


def _estimate(cost: Cost, settings: _Settings) -> Estimate:
    versions = toolchain_client.versions()
    return Estimate(
        source=f"finn-plus {versions['finn-plus']}, for {settings.board}",
        latency_ms=cost.latency_ms,
        frames_per_second=cost.frames_per_second,
        clock_mhz=settings.clock_mhz,
        layers=tuple(_layer_cost(layer) for layer in cost.layers),
        capacity={name: count for name, count in settings.chip.capacity.items() if count},
    )


def _layer_cost(layer: HardwareLayer) -> LayerCost:
    return LayerCost(
        name=layer.name,
        cycles=layer.cycles,
        resources={name: count for name, count in layer.resources.items() if count},
    )


def _fold_notes(cost: Cost, tries: int, settings: _Settings) -> list[str]:
    shares = ", ".join(
        f"{cost.total[name] / count:.0%} of {name}" for name, count in settings.chip.capacity.items() if count
    )
    wanted = (
        "the fastest that fits" if settings.target_fps is None else f"for {settings.target_fps:.12g} frames a second"
    )
    return [
        f"folding: {wanted}, {tries} tried; the slowest layer is {cost.bottleneck} with {cost.max_cycles} cycles",
        f"estimated for {settings.board}: {shares}; FIFOs and the shell around the design are not counted",
        "simulated bit for bit; no FPGA was there"
        if settings.bitfile is None
        else "the bitfile was not run here: the device proves it",
    ]

"""Finds the folding of a dataflow graph: the fastest that fits, or as small as a requested speed allows, and the cost
of each. A part of the driver."""

import copy
import math

import flow

RESOURCES = ("LUT", "BRAM_18K", "URAM", "DSP")

# FINN's own limit of the width of a weight stream for each PE; where it binds, the one that the compiler's types bear.
_NARROW, _WIDE = 36, 8191
# HLS unrolls no further (finn/custom_op/fpgadataflow/hls/matrixvectoractivation_hls.py): SIMD >= MW / 1024.
_HLS_DEPTH = 1024
_TRIES = 24
_CLOSE = 0.02  # of the cycles: a finer search gains less than the estimates are worth


class _Fold:
    """One way to fold.

    Attributes:
        cost: see :func:`_cost`.
        target: requested cycles.
    """

    def __init__(self, model, cost, target, fits):
        self.model, self.cost, self.target, self.fits = model, cost, target, fits


class _Found:
    """The result of the search.

    Attributes:
        best: the requested one, or the fastest that fits, or the smallest of all if none fits.
        fastest: the fastest that fits, as far as the search went; ``best`` if none does.
    """

    def __init__(self, best, fastest, tries):
        self.best, self.fastest, self.fits, self.tries = best, fastest, best.fits, tries


class Folding:
    """The search for a folding: more parallel hardware takes fewer cycles but more of the chip, so the requested cycles
    are bisected."""

    def __init__(self, model, config, limits, progress):
        self._model, self._config, self._limits, self._progress = model, config, limits, progress
        self._tries = 0

    def found(self, target_fps):
        if target_fps is None:
            best = self._balanced(self._fastest())
            return _Found(best, best, self._tries)
        wanted = max(1, int(self._config_hz / target_fps))
        best = self._fold(wanted)
        if best.fits and best.cost["frames_per_second"] >= target_fps:
            return _Found(best, best, self._tries)
        # It cannot be had: how much could be, the user will ask.
        return _Found(best, self._fastest(), self._tries)

    @property
    def _config_hz(self):
        return 1e9 / self._config.synth_clk_period_ns

    def _fastest(self):
        slow = self._fold(2**40)
        if not slow.fits:
            return slow
        transfers = max(layer["cycles"] for layer in slow.cost["layers"] if layer["operator"] == "IODMA")
        # Nothing is won by layers that are faster than the samples come in.
        best, low, high = slow, transfers, slow.cost["max_cycles"]
        fast = self._fold(transfers)
        if fast.fits:
            return fast
        while self._tries < _TRIES and high - low > max(1, _CLOSE * low):
            # Halfway between the two, on a scale of ratios.
            middle = max(low + 1, min(high - 1, round((low * high) ** 0.5)))
            fold = self._fold(middle)
            if fold.fits:
                if fold.cost["max_cycles"] < best.cost["max_cycles"]:
                    best = fold
                high = middle
                if fold.cost["max_cycles"] > middle:
                    # A layer goes no faster: to ask for less than it can do only makes the others larger.
                    break
            else:
                low = middle
        return best

    def _balanced(self, best):
        """Return an equally fast folding in which no layer is faster than the slowest requires."""
        if best.target >= best.cost["max_cycles"]:
            return best
        again = self._fold(best.cost["max_cycles"])
        as_fast = again.fits and again.cost["max_cycles"] <= best.cost["max_cycles"]
        return again if as_fast and again.cost["total"]["LUT"] < best.cost["total"]["LUT"] else best

    def _fold(self, cycles):
        from finn.transformation.fpgadataflow.set_folding import SetFolding
        from qonnx.transformation.general import GiveUniqueNodeNames

        self._tries += 1
        self._progress("folding", self._tries, 0)
        result = None
        for width in (_NARROW, _WIDE):
            model = copy.deepcopy(self._model)
            model = model.transform(SetFolding(cycles, mvau_wwidth_max=width, two_pass_relaxation=True))
            _deep_enough(model)
            model = model.transform(GiveUniqueNodeNames())
            model = flow.through(("step_minimize_bit_width",), model, self._config)
            cost = _cost(model, self._config)
            fits = all(cost["total"][name] <= limit for name, limit in self._limits.items())
            fold = _Fold(model, cost, cycles, fits)
            if result is None or (fold.fits and cost["max_cycles"] < result.cost["max_cycles"]):
                result = fold
            if result.cost["max_cycles"] <= cycles or result.cost["bottleneck"].startswith("IODMA"):
                break
        return result


def _deep_enough(model):
    """Raise SIMD if a matrix is folded deeper than HLS unrolls."""
    from qonnx.custom_op.registry import getCustomOp

    for node in model.graph.node:
        if node.op_type != "MVAU_hls":
            continue
        layer = getCustomOp(node)
        wide = layer.get_nodeattr("MW")
        if layer.get_nodeattr("SIMD") * _HLS_DEPTH < wide:
            least = -(-wide // _HLS_DEPTH)
            layer.set_nodeattr("SIMD", next(size for size in range(least, wide + 1) if wide % size == 0))


def _cost(model, config):
    """Return cycles and resources: ``layers`` (``{"name", "operator", "cycles", "resources"}``), ``total``,
    ``max_cycles``, ``bottleneck``, ``latency_cycles``, ``frames_per_second``, ``latency_ms``."""
    from finn.analysis.fpgadataflow.dataflow_performance import dataflow_performance
    from finn.analysis.fpgadataflow.exp_cycles_per_layer import exp_cycles_per_layer
    from finn.analysis.fpgadataflow.res_estimation import res_estimation
    from finn.transformation.fpgadataflow.annotate_cycles import AnnotateCycles

    part = config._resolve_fpga_part()
    cycles = model.analysis(exp_cycles_per_layer)
    resources = model.analysis(lambda wrapped: res_estimation(wrapped, part))
    performance = copy.deepcopy(model).transform(AnnotateCycles()).analysis(dataflow_performance)
    dma = _transfers(model, config)
    layers = [
        {
            "name": node.name,
            "operator": node.op_type,
            "cycles": int(cycles[node.name]),
            "resources": {name: float(resources[node.name].get(name, 0)) for name in RESOURCES},
        }
        for node in model.graph.node
        if node.name in resources
    ]
    layers = [dma[0], *layers, dma[1]]
    slowest = max(layers, key=lambda layer: layer["cycles"])
    latency = performance["critical_path_cycles"] + sum(layer["cycles"] for layer in dma)
    return {
        "layers": layers,
        "total": {name: sum(layer["resources"][name] for layer in layers) for name in RESOURCES},
        "max_cycles": slowest["cycles"],
        "bottleneck": slowest["name"],
        "latency_cycles": latency,
        "frames_per_second": 1e9 / config.synth_clk_period_ns / slowest["cycles"],
        "latency_ms": latency * config.synth_clk_period_ns / 1e6,
    }


def _transfers(model, config):
    """Return the DMA at both ends as layers: FINN's estimates omit them, although they are the slowest part if samples
    have many bytes. The memory port transfers one word per cycle; ``InsertIODMA`` determines the word's width."""
    from finn.util.basic import pynq_native_port_width
    from qonnx.custom_op.registry import getCustomOp

    first, last = getCustomOp(model.graph.node[0]), getCustomOp(model.graph.node[-1])
    port = pynq_native_port_width[config.board]
    found = []
    for name, width, folded in (
        ("IODMA_in", first.get_instream_width_padded(), first.get_folded_input_shape()),
        ("IODMA_out", last.get_outstream_width_padded(), last.get_folded_output_shape()),
    ):
        bits = int(width) * math.prod(int(size) for size in folded[:-1])
        resources = dict.fromkeys(RESOURCES, 0.0)
        found.append(
            {"name": name, "operator": "IODMA", "cycles": bits // math.gcd(bits, port), "resources": resources}
        )
    return found

"""Runs FINN's own flow, one step at a time: a part of the driver."""

import re
import traceback


class RefusedError(Exception):
    """An error with its class in Kedge's hierarchy."""

    def __init__(self, kind, what, where=None, remedy=None):
        super().__init__(what)
        self.wire = {"kind": kind, "what": what, "where": where, "remedy": remedy}


def configuration(request, folder):
    from finn.builder.build_dataflow_config import DataflowBuildConfig, DataflowOutputType, ShellFlowType
    from finn.util.basic import part_map

    if request["board"] not in part_map:
        known = ", ".join(sorted(part_map))
        raise RefusedError("TargetError", f"FINN knows no board {request['board']!r}", remedy=f"Known are {known}")
    config = DataflowBuildConfig(
        output_dir=str(folder),
        synth_clk_period_ns=1000.0 / request["clock_mhz"],
        generate_outputs=[DataflowOutputType.ESTIMATE_REPORTS],
        board=request["board"],
        shell_flow_type=ShellFlowType.VIVADO_ZYNQ,
        standalone_thresholds=request["standalone_thresholds"],
    )
    for made in (config.get_report_directory, config.get_intermediate_models_directory):
        made()
    return config


def through(steps, model, config):
    from finn.builder import build_dataflow_steps

    for step in steps:
        try:
            model = getattr(build_dataflow_steps, step)(model, config)
        except Exception as error:
            traceback.print_exc()
            raise RefusedError(
                "LoweringError",
                f"FINN cannot bring the graph through {step}: {_one_line(error)}",
                where=_named(error, model),
                remedy="Look at the layer that is named, see docs/fpga.md for what converts, or choose another target",
            ) from error
    return model


def steps_after(step):
    """Return the steps of FINN's own flow after a given one, up to the bitfile."""
    from finn.builder.build_dataflow_config import default_build_dataflow_steps

    return default_build_dataflow_steps[default_build_dataflow_steps.index(step) + 1 :]


def _named(error, model):
    """Return the node that an error refers to, if it names one."""
    text = str(error)
    names = [node.name for node in model.graph.node if node.name and re.search(rf"\b{re.escape(node.name)}\b", text)]
    return f"node {max(names, key=len)!r}" if names else None


def _one_line(error):
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " ".join(lines)[:600]

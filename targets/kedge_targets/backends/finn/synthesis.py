"""Writes what a machine with Vivado needs to build a bundle's bitfile: FINN's flow configuration, and a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

CONFIGURATION, SCRIPT = "build.yaml", "build.sh"
MODEL, STREAMLINED, FOLDING = "model.onnx", "streamlined.onnx", "folding.json"

_CONFIGURATION = """\
# FINN+'s flow configuration for this bundle: `finn build {configuration} {model}`, see {script}. It begins with the
# streamlined graph: that is what the simulator computes, and what was estimated.
board: {board}
shell_flow_type: vivado_zynq
synth_clk_period_ns: {period}
folding_config_file: {folding}
standalone_thresholds: {thresholds}
generate_outputs:
  - estimate_reports
  - bitfile
  - pynq_driver
  - deployment_package
output_dir: build
steps:
{steps}
"""

_SCRIPT = """\
#!/usr/bin/env bash
# Builds the bitfile of this bundle; takes hours. Needs Vivado and Vitis HLS (2022.2 or newer, settings64.sh sourced)
# and `pip install finn-plus=={version}` on Python 3.11. Afterwards:
#   kedge compile ... --bitfile build/deploy/bitfile/finn-accel.bit
set -euo pipefail
cd "$(dirname "$0")"
: "${{XILINX_VIVADO:?source the settings64.sh of Vivado first}}"
command -v finn >/dev/null || {{ echo "finn is not on the PATH: pip install finn-plus=={version}" >&2; exit 1; }}
finn build {configuration} {model}
# Driver settings belong beside the bitfile.
cp -f build/deploy/driver/settings.json build/deploy/bitfile/
ls -l build/deploy/bitfile
"""


def written(
    folder: Path, *, board: str, clock_mhz: float, standalone_thresholds: bool, steps: Sequence[str], version: str
) -> dict[str, Path]:
    """Write both files.

    Args:
        steps: steps of FINN's flow, from the streamlined graph on.
        version: version of finn-plus.

    Returns:
        Title → path.
    """
    texts = {
        CONFIGURATION: _CONFIGURATION.format(
            configuration=CONFIGURATION,
            model=STREAMLINED,
            script=SCRIPT,
            board=board,
            period=1000.0 / clock_mhz,
            folding=FOLDING,
            thresholds="true" if standalone_thresholds else "false",
            steps="\n".join(f"  - {step}" for step in steps),
        ),
        SCRIPT: _SCRIPT.format(version=version, model=STREAMLINED, configuration=CONFIGURATION),
    }
    files = {}
    for title, text in texts.items():
        files[title] = folder / title
        files[title].write_text(text, encoding="utf-8")
    return files

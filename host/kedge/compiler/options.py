"""What a compilation is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from kedge.options import Option


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """Everything :func:`kedge.compile` takes beside the model; ``kedge compile`` derives its options from it."""

    name: Annotated[str, Option("The model's name in the fleet.")]
    version: Annotated[str, Option("The release's version, e.g. 1.0.")]
    targets: Annotated[
        tuple[str, ...],
        Option(
            "A device: a name that `kedge target list` shows, or ./board.toml; repeat for several.",
            flag="--target",
            metavar="NAME",
        ),
    ]
    calibration: Annotated[Path, Option("Samples for calibration: an .npz, or a folder of .npy files.")]
    evaluation: Annotated[
        Path, Option("Samples for evaluation, none of them in the calibration; with `label` if there are.")
    ]
    out: Annotated[Path, Option("The release's folder; it appears whole or not at all.", short="-o", metavar="OUT")]
    max_drop: Annotated[float, Option("How much lower than the float model's the metric may be.")] = 0.01
    preprocess: Annotated[
        tuple[str, ...],
        Option(
            "What turns a raw sample into the model's input, (raw * scale - mean) / std: scale=1/255,mean=0.5,std=0.5; "
            "per channel with colons, mean=0.485:0.456:0.406; for one of several inputs NAME:scale=1/255.",
            metavar="STEPS",
        ),
    ] = ()
    metric: Annotated[
        str | None,
        Option(
            "Your own metric, function(outputs, inputs, labels) -> float, higher is better.",
            metavar="FILE.py:FUNCTION",
        ),
    ] = None
    labels: Annotated[Path | None, Option("Class names, one on each line, in the order of the output.")] = None
    deadline: Annotated[float, Option("Seconds that one step (a lowering, an evaluation) may take.")] = 3600.0
    memory_limit: Annotated[
        int | None, Option("MiB of memory that one step may take; four fifths of this machine's by default.")
    ] = None
    force: Annotated[bool, Option("Replace OUT if it is there.")] = False

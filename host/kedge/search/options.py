"""What a compilation is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from kedge.options import Option
from kedge.search.effort import Effort
from kedge_protocol.bundle.config import NO_BATCH
from kedge_protocol.errors import ConfigError
from kedge_targets.contract import Compiler


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
    max_drop: Annotated[float, Option("How much worse than the float model's the metric may be.")] = 0.01
    min_agreement: Annotated[
        float | None,
        Option("Share of the samples that must get the float model's own answer, right or wrong, from 0 to 1."),
    ] = None
    confidence: Annotated[
        float | None,
        Option(
            "Take what is shown to keep --max-drop this surely, e.g. 0.95: the end of the drop's interval decides; by "
            "default the measured drop itself does."
        ),
    ] = None
    max_size: Annotated[
        str | None,
        Option("What the files may weigh: 200k, 1.5MB, 300KiB, or a share of the model's file, 0.3x.", metavar="SIZE"),
    ] = None
    max_latency: Annotated[
        float | None, Option("Milliseconds that one call with one sample may take on the target.", metavar="MS")
    ] = None
    effort: Annotated[
        Effort, Option("How long to look: the usual precision only, what repairs it, or the whole front.")
    ] = Effort.NORMAL
    time_limit: Annotated[
        float | None,
        Option(
            "Seconds after which the search begins no other candidate and takes the best so far; by default 1800 with "
            "effort normal, 600 with quick, none with high.",
            metavar="SECONDS",
        ),
    ] = None
    recipe: Annotated[
        Path | None, Option("Do what a recipe.toml says instead of searching.", metavar="RECIPE.toml")
    ] = None
    step: Annotated[
        tuple[str, ...],
        Option(
            "A step to do, instead of searching: NAME or NAME:option=value,option=value; repeat for several, in order.",
            metavar="STEP",
        ),
    ] = ()
    quantize: Annotated[
        str | None,
        Option("How to quantize, instead of searching: precision=int8,range_method=mse,…", metavar="option=value,…"),
    ] = None
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
            "A known metric, of an output where one is named: top1, map, cosine:embedding; or your own, "
            "FILE.py:FUNCTION, function(outputs, inputs, labels) -> float (or an array of one number for each sample), "
            "higher is better.",
            metavar="KIND[:OUTPUT]",
        ),
    ] = None
    annotations: Annotated[
        Path | None,
        Option(
            "What is right for the evaluation samples, where the data set holds no `label`: COCO JSON, a folder of "
            "YOLO text files, an .npy (classes, multi-hot, masks), or a .txt with a line for each sample.",
        ),
    ] = None
    loss: Annotated[
        str | None,
        Option(
            "Your own loss for fine-tuning with labels, function(outputs, inputs, labels) -> torch scalar.",
            metavar="FILE.py:FUNCTION",
        ),
    ] = None
    labels: Annotated[Path | None, Option("Class names, one on each line, in the order of the output.")] = None
    deadline: Annotated[float, Option("Seconds that one step (a lowering, an evaluation) may take.")] = 3600.0
    memory_limit: Annotated[
        int | None, Option("MiB of memory that one step may take; four fifths of this machine's by default.")
    ] = None
    force: Annotated[bool, Option("Replace OUT if it is there: a release or an empty folder, nothing else.")] = False
    batch: Annotated[
        int | None, Option("Fix the batch of a model that is not ONNX yet; it stays free by default.", metavar="N")
    ] = None
    batch_axis: Annotated[
        tuple[str, ...],
        Option(
            "Which axis of an input or output is the batch, where the model's file does not tell: state=1, sr=none; "
            "repeat for several.",
            metavar="NAME=AXIS|none",
        ),
    ] = ()
    state: Annotated[
        tuple[str, ...],
        Option(
            "An input that takes in each call what an output gave in the call before, where names do not tell; repeat "
            "for several.",
            metavar="IN=OUT",
        ),
    ] = ()
    seed: Annotated[int | None, Option("Of everything random; a recipe's own, or 0, by default.")] = None
    jobs: Annotated[int | None, Option("Trials at once; by default one for each core.", metavar="N")] = None
    checkpoints: Annotated[
        Path | None, Option("Keep the state of training in this folder, and go on from what lies there.")
    ] = None
    latencies: Annotated[
        Path | None,
        Option("Latencies of devices (`kedge device latencies -o FILE`), or search.json of an earlier compilation."),
    ] = None
    scheduler: Annotated[
        str | None, Option("Run trials on the Dask cluster of this scheduler.", metavar="tcp://HOST:PORT")
    ] = None
    target_fps: Annotated[
        float | None, Option("Samples a second that the device must reach; for programmable logic.")
    ] = None
    max_utilization: Annotated[
        float | None, Option("Share of a programmable device's resources that may be used, 0..1.")
    ] = None
    bitfile: Annotated[
        Path | None, Option("A finished bitfile (its .hwh beside it) of this very model; for programmable logic.")
    ] = None

    @property
    def batch_axes(self) -> dict[str, int]:
        """:attr:`batch_axis` by tensor.

        Raises:
            ConfigError: not of the form ``NAME=AXIS`` or ``NAME=none``.
        """
        found: dict[str, int] = {}
        for text in self.batch_axis:
            name, equals, axis = text.rpartition("=")
            if not equals or not name or not (axis == "none" or axis.isdigit()):
                raise ConfigError(
                    f"{text!r} cannot be read",
                    where="--batch-axis",
                    remedy="Write it as NAME=AXIS or NAME=none: state=1",
                )
            found[name] = NO_BATCH if axis == "none" else int(axis)
        return found

    @property
    def states(self) -> dict[str, str]:
        """:attr:`state`, input to output.

        Raises:
            ConfigError: not of the form ``IN=OUT``, or an input or output in two of them.
        """
        pairs = [text.partition("=")[::2] for text in self.state]
        for text, (name, output) in zip(self.state, pairs, strict=True):
            if not name or not output:
                raise ConfigError(f"{text!r} cannot be read", where="--state", remedy="Write it as INPUT=OUTPUT")
        found = dict(pairs)
        if len(found) < len(pairs) or len(set(found.values())) < len(pairs):
            raise ConfigError("an input or output is in two states", where="--state")
        return found

    @property
    def loss_function(self) -> str | None:
        """The user's loss with its file's whole path; the worker may stand elsewhere."""
        if self.loss is None:
            return None
        path, _, name = self.loss.rpartition(":")
        return f"{Path(path).absolute()}:{name}"

    def requirements(self, compiler: Compiler) -> dict[str, Any]:
        """What was asked for beside the target's own options, as far as a backend takes it."""
        return {name: value for name, value in self.asked_of_backends().items() if name in compiler.requirements}

    def asked_of_backends(self) -> dict[str, Any]:
        """All such requirements."""
        asked = {
            "target_fps": self.target_fps,
            "max_utilization": self.max_utilization,
            "bitfile": None if self.bitfile is None else str(self.bitfile.absolute()),
        }
        return {name: value for name, value in asked.items() if value is not None}

"""The options of a compilation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from kedge.options import Option
from kedge.search.effort import Effort
from kedge_protocol.bundle.config import NO_BATCH
from kedge_protocol.bundle.pipeline import Task
from kedge_protocol.errors import ConfigError
from kedge_targets.contract import Compiler

_LANGUAGE_MODELS = frozenset({
    "max_perplexity", "max_kl", "choices", "max_memory", "min_tokens_per_second", "context", "slots", "cache", "split",
    "adapter",
})  # fmt: skip
"""Options for language models alone."""
_ALL_MODELS = frozenset({
    "name", "version", "targets", "calibration", "evaluation", "out", "max_size", "effort", "recipe", "step",
    "quantize", "deadline", "memory_limit", "force", "trust_pickle", "seed",
})  # fmt: skip
"""Options that language models share with all others."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """All arguments of :func:`kedge.compile` besides the model; ``kedge compile`` derives its options from them."""

    name: Annotated[str, Option("The model's name in the fleet.")]
    version: Annotated[str, Option("The release's version, e.g. 1.0.")]
    targets: Annotated[
        tuple[str, ...],
        Option(
            "Target device: a name from `kedge target list`, or a file such as ./board.toml. Repeat for several.",
            flag="--target",
            metavar="NAME",
        ),
    ]
    calibration: Annotated[
        Path,
        Option(
            "Calibration samples: an .npz file, or a folder of .npy files; with a pipeline also images or wav files in"
            " class folders, COCO JSON, a data.yaml, a CSV, or lines of text."
        ),
    ]
    evaluation: Annotated[
        Path,
        Option(
            "Evaluation samples, disjoint from the calibration samples; include an array `label` if you have labels."
        ),
    ]
    out: Annotated[
        Path, Option("Output folder of the release; it is written completely or not at all.", short="-o", metavar="OUT")
    ]
    max_drop: Annotated[float, Option("Largest allowed drop of the metric below the float model's.")] = 0.01
    min_agreement: Annotated[
        float | None,
        Option("Smallest share of samples (0 to 1) that must get the same answer as the float model, right or wrong."),
    ] = None
    confidence: Annotated[
        float | None,
        Option(
            "Require --max-drop at this confidence, e.g. 0.95: the upper end of the drop's interval decides."
            " By default the measured drop decides."
        ),
    ] = None
    max_size: Annotated[
        str | None,
        Option(
            "Largest size of the files: 200k, 1.5MB, 300KiB, or relative to the model's file, 0.3x.", metavar="SIZE"
        ),
    ] = None
    max_latency: Annotated[
        float | None, Option("Longest time, in milliseconds, for one call with one sample on the target.", metavar="MS")
    ] = None
    effort: Annotated[
        Effort,
        Option(
            "How far to search: quick tries the usual precision only, normal also tries repairs, high "
            "explores the whole Pareto front."
        ),
    ] = Effort.NORMAL
    time_limit: Annotated[
        float | None,
        Option(
            "Time limit of the search: after it no new candidate is started and the best one so far is "
            "taken. Default: 1800 for normal, 600 for quick, none for high.",
            metavar="SECONDS",
        ),
    ] = None
    recipe: Annotated[Path | None, Option("Follow a recipe file instead of searching.", metavar="RECIPE.toml")] = None
    step: Annotated[
        tuple[str, ...],
        Option(
            "Apply this step instead of searching: NAME or NAME:option=value,option=value. Repeat for "
            "several; they run in order.",
            metavar="STEP",
        ),
    ] = ()
    quantize: Annotated[
        str | None,
        Option("Quantize like this instead of searching: precision=int8,range_method=mse,…", metavar="option=value,…"),
    ] = None
    preprocess: Annotated[
        tuple[str, ...],
        Option(
            "Preprocessing of raw samples, (raw * scale - mean) / std: scale=1/255,mean=0.5,std=0.5. "
            "Separate per-channel values by colons: mean=0.485:0.456:0.406. For one of several inputs: "
            "NAME:scale=1/255.",
            metavar="STEPS",
        ),
    ] = ()
    task: Annotated[
        Task | None,
        Option(
            "Use this task's ready pipeline: it makes tensors of pictures, sounds or texts, and answers of outputs."
        ),
    ] = None
    pipeline: Annotated[
        Path | None, Option("A pipeline of your own; see docs/pipelines.md.", metavar="PIPELINE.toml")
    ] = None
    calibration_samples: Annotated[
        int | None,
        Option("Take at most this many items of a calibration folder, spread evenly. Default: 512.", metavar="N"),
    ] = None
    evaluation_samples: Annotated[
        int | None,
        Option("Take at most this many items of an evaluation folder, spread evenly. Default: all.", metavar="N"),
    ] = None
    metric: Annotated[
        str | None,
        Option(
            "Metric, optionally of one output: top1, map, cosine:embedding; or your own FILE.py:FUNCTION "
            "with the signature function(outputs, inputs, labels) -> float (or an array with one number per "
            "sample); higher is better.",
            metavar="KIND[:OUTPUT]",
        ),
    ] = None
    annotations: Annotated[
        Path | None,
        Option(
            "Ground truth of the evaluation samples if the data set has no `label`: COCO JSON, a folder of "
            "YOLO text files, an .npy file (classes, multi-hot, masks), or a .txt file with one line per "
            "sample.",
        ),
    ] = None
    loss: Annotated[
        str | None,
        Option(
            "Your own loss for fine-tuning with labels: function(outputs, inputs, labels) -> torch scalar.",
            metavar="FILE.py:FUNCTION",
        ),
    ] = None
    labels: Annotated[Path | None, Option("File with class names, one per line, in the order of the output.")] = None
    deadline: Annotated[float, Option("Time limit, in seconds, for one step such as a lowering or an evaluation.")] = (
        3600.0
    )
    memory_limit: Annotated[
        int | None, Option("Memory limit, in MiB, for one step. Default: four fifths of this machine's memory.")
    ] = None
    force: Annotated[bool, Option("Replace OUT if it exists; it must be a release or an empty folder.")] = False
    batch: Annotated[
        int | None,
        Option(
            "Fix the batch size of a model that is imported from another format. Default: the batch stays dynamic.",
            metavar="N",
        ),
    ] = None
    trust_pickle: Annotated[
        bool,
        Option(
            "Read a pickled model (.pkl, .joblib, .pt) or Keras .h5, which may run any code: only for files that you "
            "made or trust."
        ),
    ] = False
    batch_axis: Annotated[
        tuple[str, ...],
        Option(
            "Batch axis of an input or output, if the model file does not show it: state=1, sr=none. Repeat "
            "for several.",
            metavar="NAME=AXIS|none",
        ),
    ] = ()
    state: Annotated[
        tuple[str, ...],
        Option(
            "State input that receives in each call what an output returned in the previous call, if the "
            "names do not show it. Repeat for several.",
            metavar="IN=OUT",
        ),
    ] = ()
    seed: Annotated[int | None, Option("Seed of the random numbers. Default: the recipe's, or 0.")] = None
    jobs: Annotated[int | None, Option("Number of parallel trials. Default: one per core.", metavar="N")] = None
    checkpoints: Annotated[
        Path | None, Option("Folder for training checkpoints; training resumes from those that are there.")
    ] = None
    latencies: Annotated[
        Path | None,
        Option(
            "Latencies measured on devices (`kedge device latencies -o FILE`), or search.json of an earlier "
            "compilation."
        ),
    ] = None
    every_backend: Annotated[
        bool,
        Option(
            "Give each target one bundle for each of its backends that keeps the budget; devices measure them and run "
            "the fastest (see docs/fleet.md)."
        ),
    ] = False
    scheduler: Annotated[
        str | None, Option("Run the trials on the Dask cluster of this scheduler.", metavar="tcp://HOST:PORT")
    ] = None
    target_fps: Annotated[float | None, Option("Required throughput in samples per second (FPGA targets).")] = None
    max_utilization: Annotated[
        float | None, Option("Largest share (0 to 1) of the device's resources that may be used (FPGA targets).")
    ] = None
    bitfile: Annotated[
        Path | None, Option("Finished bitfile of exactly this model, with its .hwh file beside it (FPGA targets).")
    ] = None
    max_perplexity: Annotated[
        str | None,
        Option(
            "For a language model: largest allowed perplexity, as a number, or as 1.05x of the float model's. Default: "
            "1.15x.",
            metavar="LIMIT",
        ),
    ] = None
    max_kl: Annotated[
        float | None,
        Option("For a language model: largest allowed KL divergence from the float model, in nats per token."),
    ] = None
    choices: Annotated[
        Path | None,
        Option(
            "For a language model: multiple-choice questions as JSON lines with question, choices and answer; how many "
            "are answered rightly by log-likelihood is told beside the other figures.",
            metavar="QUESTIONS.jsonl",
        ),
    ] = None
    max_memory: Annotated[
        str | None,
        Option(
            "For a language model: largest memory of weights and caches at this --context and these --slots: 300MB, "
            "1.5GiB.",
            metavar="SIZE",
        ),
    ] = None
    min_tokens_per_second: Annotated[
        float | None,
        Option(
            "For a language model: fewest tokens a second that one sequence is written at, measured on this machine; "
            "only for targets with its processor."
        ),
    ] = None
    context: Annotated[
        int | None,
        Option("For a language model: number of positions of one sequence. Default: the model's own, at most 4096."),
    ] = None
    slots: Annotated[
        int | None,
        Option("For a language model: number of sequences that the device has memory for at once. Default: 1."),
    ] = None
    cache: Annotated[
        str | None,
        Option(
            "For a language model: precision of the cached keys and values, float32, or int8, which takes a quarter of "
            "the memory. Default: float32.",
            metavar="PRECISION",
        ),
    ] = None
    split: Annotated[
        int | None,
        Option(
            "For a language model: spread its layers over this many devices of one site, as their memory allows. One "
            "target for all, or one for each in order. OUT then holds a release for each part.",
            metavar="N",
        ),
    ] = None
    adapter: Annotated[Path | None, Option("For a language model: a LoRA folder that is merged into its weights.")] = (
        None
    )

    @property
    def batch_axes(self) -> dict[str, int]:
        """Return :attr:`batch_axis` by tensor.

        Raises:
            ConfigError: an entry is not of the form ``NAME=AXIS`` or ``NAME=none``.
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
        """Return :attr:`state` as a map from input to output.

        Raises:
            ConfigError: an entry is not of the form ``IN=OUT``, or an input or output is in two entries.
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
        """Return the user's loss with the absolute path of its file, since the worker may run in another folder."""
        if self.loss is None:
            return None
        path, _, name = self.loss.rpartition(":")
        return f"{Path(path).absolute()}:{name}"

    def check_kind(self, *, language_model: bool) -> None:
        """Refuse an option that a model of this kind does not take, since it would be silently ignored.

        Raises:
            ConfigError: it names the option.
        """
        for field in dataclasses.fields(self):
            foreign = field.name not in _ALL_MODELS and (field.name in _LANGUAGE_MODELS) != language_model
            if foreign and getattr(self, field.name) != field.default:
                raise ConfigError(
                    "is not for language models" if language_model else "is for language models only",
                    where=f"--{field.name.replace('_', '-')}",
                    remedy="Leave it out; docs/generation.md says what they take" if language_model else "Leave it out",
                )

    def requirements(self, compiler: Compiler) -> dict[str, Any]:
        """Return the user's requirements that a backend takes, in addition to the target's own options."""
        return {name: value for name, value in self.asked_of_backends().items() if name in compiler.requirements}

    def asked_of_backends(self) -> dict[str, Any]:
        """Return all requirements that the user gave for backends."""
        asked = {
            "target_fps": self.target_fps,
            "max_utilization": self.max_utilization,
            "bitfile": None if self.bitfile is None else str(self.bitfile.absolute()),
        }
        return {name: value for name, value in asked.items() if value is not None}

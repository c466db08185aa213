"""The compiler's public door."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kedge.compiler import service
from kedge.compiler.ladder import Tell
from kedge.compiler.options import CompileOptions
from kedge.compiler.release import Release


def compile(  # noqa: A001 -- kedge.compile is the public name
    model: str | os.PathLike[str],
    *,
    name: str,
    version: str,
    targets: Sequence[str],
    calibration: str | os.PathLike[str],
    evaluation: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_drop: float = 0.01,
    preprocess: str | Sequence[str] | None = None,
    metric: str | None = None,
    labels: str | os.PathLike[str] | None = None,
    deadline: float = 3600.0,
    memory_limit: int | None = None,
    force: bool = False,
    progress: Tell | None = None,
) -> Release:
    """Compile a trained model into a release: one bundle for each target, in an OCI image layout at ``out``.

    Args:
        model: an ONNX file; it is never changed.
        name: of the model in the fleet.
        version: of the release.
        targets: names (``rpi4``) or paths of target files (``./board.toml``).
        calibration: samples for quantization: an ``.npz`` or a folder of ``.npy`` files, one array for each input by
            its name (or ``input`` where there is one), first axis samples.
        evaluation: at least 8 other samples, likewise, with ``label`` where there are labels.
        out: the folder that is made.
        max_drop: how much lower than the float model's the metric may be; a target over it falls back from int8 to
            float16 and float32.
        preprocess: ``scale=1/255,mean=0.5,std=0.5``, per channel with colons, for several inputs one text each,
            beginning with ``NAME:``.
        metric: ``file.py:function`` of your own, ``function(outputs, inputs, labels) -> float``, with dicts of arrays
            by name, ``labels`` an array or None, higher is better. Without it: top-1 where there are labels, else
            agreement with the float model (same top-1 for class scores, cosine otherwise).
        labels: a file of class names, one on each line.
        deadline: seconds that one step may take.
        memory_limit: MiB that one step may take; four fifths of the machine's memory by default.
        force: replace ``out`` if it is there.
        progress: called with who (a target's name, ``reference``, ``data``), what, done, total; from several threads.

    Returns:
        The release. Where some targets could not be compiled the others are still written, and
        ``release.failures`` maps each failed target to its error; only when none could be is an error raised.

    Raises:
        InputError: the model, a data set, a target or an option is wrong (:class:`kedge.errors.ModelError`, …).
        CompileError: no target could be compiled within the drop.
        MissingDependencyError: Python older than 3.11, or the ``compile`` extra or a toolchain is missing.
        StorageError: ``out`` exists, or the disk is full. In every such case ``out`` is as it was before.
    """
    steps = (preprocess,) if isinstance(preprocess, str) else tuple(preprocess or ())
    options = CompileOptions(
        name=name,
        version=version,
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        calibration=Path(calibration),
        evaluation=Path(evaluation),
        out=Path(out),
        max_drop=max_drop,
        preprocess=steps,
        metric=metric,
        labels=None if labels is None else Path(labels),
        deadline=deadline,
        memory_limit=memory_limit,
        force=force,
    )
    return service.run(Path(model), options, tell=progress)

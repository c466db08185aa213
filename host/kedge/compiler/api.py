"""The public function of the compiler: :func:`kedge.compile`."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge.compiler import arguments, service
from kedge.compiler.release import Release
from kedge.search.results import ProgressCallback

if TYPE_CHECKING:
    from typing import Unpack

    from kedge.compiler.arguments import CompileArguments


def compile(  # noqa: A001 -- kedge.compile is the public name
    model: str | os.PathLike[str] | object,
    *,
    progress: ProgressCallback | None = None,
    **options: Unpack[CompileArguments],
) -> Release:
    """Compile a trained model into a release: a bundle for each target, in an OCI image layout at ``out``.

    Args:
        model: an ONNX file, ``file.py:factory`` or ``module:factory`` of PyTorch, a ``.pt2`` exported program, a
            ``.keras`` file, a SavedModel folder, a float ``.tflite`` file, a Hugging Face folder, a GGUF file; a
            ``torch.nn.Module``, a ``keras.Model`` or a fitted scikit-learn estimator. It is never changed.
        progress: called with who (a target's name, ``reference``, ``data``), what, done, total; from several threads.
        options: the fields of :class:`kedge.search.options.CompileOptions`, the same as for ``kedge compile``. A path
            may be a ``str``, a sequence of one text may be the text itself, and ``max_size`` a number of bytes.
            ``calibration`` and ``evaluation`` may also be Python iterables (a torch ``DataLoader``) of samples or
            batches, of mappings of them by the inputs' names, of raw data for the pipeline, or of pairs of any of these
            and its label (:mod:`kedge.importing.iterables`).
            ``batch_axes`` maps a tensor's name to its batch axis, or to None if it has none; ``states`` maps a state
            input to the output that feeds it.

    Returns:
        The release. If some targets could not be compiled, the others are still written, and ``release.failures``
        maps each failed target to its error; an error is raised only if no target could be compiled.

    Raises:
        InputError: the model, a data set, a target or an option is wrong (:class:`kedge.errors.ModelError`, …).
        BudgetError: no target meets the budget; the nearest result is kept in the folder ``OUT.nearest``.
        CompileError: no target could be compiled.
        MissingDependencyError: Python older than 3.11, or the ``compile`` extra or a toolchain is missing.
        StorageError: ``out`` exists, or the disk is full. In all these cases ``out`` stays unchanged.
    """
    _SIGNATURE.bind(model, progress=progress, **options)
    source = Path(model) if isinstance(model, os.PathLike) else model
    iterables: dict[str, Any] = {role: one for role, one in options.items() if role in _DATA and _is_iterable(one)}
    named = {**options, **dict.fromkeys(iterables, "(iterable)")}
    return service.run(source, arguments.to_options(named), on_progress=progress, iterables=iterables)


_DATA = ("calibration", "evaluation")
"""Arguments that may be Python iterables."""


def _is_iterable(data: object) -> bool:
    """Return whether these are samples and no path; a data set of torch may have ``__getitem__`` alone."""
    return not isinstance(data, (str, os.PathLike)) and (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))


def _signature() -> inspect.Signature:
    """Return the signature with each option by name, for ``help`` and editors."""
    model, progress, _ = inspect.signature(compile).parameters.values()
    return inspect.signature(compile).replace(parameters=[model, *arguments.parameters(), progress])


_SIGNATURE = _signature()
compile.__signature__ = _SIGNATURE  # type: ignore[attr-defined]  # how a function tells another signature
compile.__doc__ = (compile.__doc__ or "").replace("\n    Returns:", f"\n{arguments.described()}\n\n    Returns:")

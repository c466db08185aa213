"""The worker's task that turns a model of any kind into an ONNX graph and checks that it computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge.importing import agreement, axes, digests, model_kinds
from kedge.importing.model_kinds import Kind
from kedge.importing.worker_messages import Imported, ImportRequest
from kedge_protocol.errors import ModelError, StorageError
from kedge_targets.importer import Importer
from kedge_targets.worker import Progress

if TYPE_CHECKING:
    from kedge.importing.pytorch import Program

Array = npt.NDArray[Any]

_GRAPH = "imported.onnx"
_AT_THRESHOLDS = 0.05
"""Share of samples in which a model of trees may differ: whole numbers behind a scaler often lie on a threshold."""


def import_model(request: ImportRequest, progress: Progress) -> Imported:
    """Import a model; a task of the worker.

    Raises:
        ModelError: the file does not exist, its kind is not supported, the factory raises, or the graph does not
            compute what the model computes.
        UnsupportedOperatorError: an operator has no counterpart in ONNX.
        MissingDependencyError: a package or toolchain that this kind needs is not installed.
        StorageError: there is no space for the graph.
    """
    kind = model_kinds.recognise(request.source, trust_pickle=request.trust_pickle)
    try:
        Path(request.workdir).mkdir(parents=True, exist_ok=True)
        if isinstance(kind, Importer):
            return _by_importer(kind, request, progress)
        return _READERS[kind](request, progress)
    except OSError as error:
        raise StorageError(f"cannot be written: {error}", where=request.workdir) from error


def _onnx(request: ImportRequest, progress: Progress) -> Imported:
    path = Path(request.source)
    notes: tuple[str, ...] = ()
    graph = path
    if request.batch is not None:
        from kedge_targets.graph import model_reader

        graph = Path(request.workdir) / _GRAPH
        notes = _fixed(model_reader.load(path), request.batch, graph, str(path))
    found, size = digests.of_path(path)
    return Imported(graph=str(graph), kind=Kind.ONNX.value, notes=notes, tools={}, source_digest=found, size_bytes=size)


def _unknown(request: ImportRequest, progress: Progress) -> Imported:
    """Import a file with an unknown suffix, which is ONNX or cannot be read."""
    from kedge_targets.graph import model_reader

    try:
        model_reader.load(Path(request.source))
    except ModelError as error:
        if not error.what.startswith("is not an ONNX model"):
            raise
        raise ModelError(
            "is not an ONNX model, and its suffix is of no other kind",
            where=request.source,
            remedy=f"Kedge reads {model_kinds.readable()}",
        ) from error
    return _onnx(request, progress)


def _factory(request: ImportRequest, progress: Progress) -> Imported:
    import torch

    from kedge.importing import factory, pytorch

    named = model_kinds.factory(request.source)
    if named is None:  # it was a factory a moment ago
        raise ModelError("there is no such file", where=request.source)
    progress("build", 0, 0)
    module, example = factory.call_factory(named, Path(request.folder))
    if isinstance(module, torch.export.ExportedProgram):
        found, size = digests.of_module(module, named.file)
        return _program(_as_it_is(module), Kind.EXPORTED, request, progress, found, size)
    example = example or factory.example_from_samples(module, _samples(request), request.source)
    found, size = digests.of_module(module, named.file)
    progress("trace", 0, 0)
    with pytorch.evaluation_mode(module):
        made = pytorch.export_program(module, example, batch=request.batch, where=request.source)
    return _program(made, Kind.FACTORY, request, progress, found, size)


def _as_it_is(program: Any) -> Program:
    from kedge.importing.pytorch import Program

    return Program(program, ())


def _exported(request: ImportRequest, progress: Progress) -> Imported:
    import torch

    path = Path(request.source)
    progress("load", 0, 0)
    try:
        program = torch.export.load(str(path))
    except Exception as error:  # torch's errors for a broken archive have no common base
        raise ModelError(
            f"torch.export cannot load it: {(str(error).splitlines() or [type(error).__name__])[0]}",
            where=str(path),
            remedy=f"Save it with torch.export.save of the installed PyTorch, {torch.__version__}, or of an older one",
        ) from error
    return _program(_as_it_is(program), Kind.EXPORTED, request, progress, *digests.of_path(path))


def _program(made: Program, kind: Kind, request: ImportRequest, progress: Progress, found: str, size: int) -> Imported:
    """Export a program and compare the results."""
    from kedge.importing import pytorch

    graph = Path(request.workdir) / _GRAPH
    progress("export", 0, 0)
    free = pytorch.to_onnx(made, graph, where=request.source)
    progress("compare", 0, 0)
    arrays = pytorch.example_arrays(made.program)
    names = pytorch.input_names(made.program)
    _compare(graph, names, arrays, lambda feed: pytorch.answers(made.program, [feed[name] for name in names]), request)
    notes = (*made.notes, *_fix(graph, request, free))
    return Imported(
        graph=str(graph), kind=kind.value, notes=notes, tools=pytorch.tools(), source_digest=found, size_bytes=size
    )


def _pickled(request: ImportRequest, progress: Progress) -> Imported:
    from kedge.importing import factory, pickled, sklearn_model

    path = Path(request.source)
    progress("load", 0, 0)
    made = pickled.read(path, Path(request.folder))
    if isinstance(made, dict) and hasattr(made.get("model"), "forward"):
        made = made["model"]  # what training scripts save beside their optimizer
    if hasattr(made, "forward") and hasattr(made, "state_dict"):
        from kedge.importing import pytorch

        module = made.float()
        example = factory.example_from_samples(module, _samples(request), request.source)
        progress("trace", 0, 0)
        with pytorch.evaluation_mode(module):
            program = pytorch.export_program(module, example, batch=request.batch, where=request.source)
        return _program(program, Kind.PICKLED, request, progress, *digests.of_path(path))
    if sklearn_model.is_estimator(made):
        return _estimator(made, request, progress)
    held = "weights without a network" if isinstance(made, dict) else f"a {type(made).__name__}"
    raise ModelError(f"holds {held}, no model", where=request.source, remedy=pickled.FACTORY)


def _estimator(made: Any, request: ImportRequest, progress: Progress) -> Imported:
    import onnx

    from kedge.importing import sklearn_model
    from kedge_targets.graph import model_reader, model_writer

    graph = Path(request.workdir) / _GRAPH
    progress("export", 0, 0)
    feed = sklearn_model.example(made, _samples(request), where=request.source)
    sklearn_model.to_onnx(made, graph, feed, where=request.source)
    model_writer.save(model_reader.load(graph), graph)
    written = onnx.load_model(str(graph)).graph
    outputs = [value.name for value in written.output]
    trees = any(node.op_type.startswith("TreeEnsemble") for node in written.node)
    progress("compare", 0, 0)
    differing = agreement.check(
        graph,
        [feed],
        lambda given: sklearn_model.answers(made, given, outputs),
        where=request.source,
        at_thresholds=_AT_THRESHOLDS if trees else 0.0,
    )
    samples = len(next(iter(feed.values())))
    rounded = (f"{differing} of {samples} samples lie on a threshold of a tree and differ in float32",)
    found, size = digests.of_path(Path(request.source))
    return Imported(
        graph=str(graph),
        kind=f"scikit-learn {type(made).__name__}",
        notes=(*(rounded if differing else ()), *_fix(graph, request, (axes.BATCH,))),
        tools=sklearn_model.tools(),
        source_digest=found,
        size_bytes=size,
    )


def _transformers(request: ImportRequest, progress: Progress) -> Imported:
    from kedge.importing import pytorch, transformers_folder

    path = Path(request.source)
    progress("load", 0, 0)
    module, example = transformers_folder.read(path)
    progress("trace", 0, 0)
    with pytorch.evaluation_mode(module):
        program = pytorch.export_program(module, example, batch=request.batch, where=request.source)
    made = _program(program, Kind.TRANSFORMERS, request, progress, *digests.of_path(path))
    return replace(made, tools={**made.tools, **transformers_folder.tools()})


def _keras(request: ImportRequest, progress: Progress) -> Imported:
    import torch

    from kedge.importing import keras_file, pytorch

    path, graph = Path(request.source), Path(request.workdir) / _GRAPH
    progress("load", 0, 0)
    model = keras_file.read(path)
    module = keras_file.module(model)
    arrays = keras_file.example(model, _samples(request))
    inputs, outputs = keras_file.names(model)
    free = {f"input_{at}": named for at, named in enumerate(keras_file.free_axes(model))}
    example = pytorch.Example(tuple(torch.from_numpy(array) for array in arrays), {}, free)
    progress("trace", 0, 0)
    with pytorch.evaluation_mode(module):
        made = pytorch.export_program(module, example, batch=request.batch, where=str(path))
        progress("export", 0, 0)
        left = pytorch.to_onnx(made, graph, where=str(path), inputs=inputs, outputs=outputs)
        progress("compare", 0, 0)
        arrays = pytorch.example_arrays(made.program)

        def framework(feed: Mapping[str, Array]) -> list[Array]:
            answer = module(*(torch.from_numpy(feed[name]) for name in inputs))
            leaves, _ = torch.utils._pytree.tree_flatten(answer)
            return [np.asarray(leaf.detach()) for leaf in leaves]

        _compare(graph, inputs, arrays, framework, request)
    found, size = digests.of_path(path)
    return Imported(
        graph=str(graph),
        kind=Kind.KERAS.value,
        notes=(*made.notes, *_fix(graph, request, left)),
        tools={**keras_file.tools(), **pytorch.tools()},
        source_digest=found,
        size_bytes=size,
    )


def _by_importer(importer: Importer, request: ImportRequest, progress: Progress) -> Imported:
    path, graph = Path(request.source), Path(request.workdir) / _GRAPH
    progress("export", 0, 0)
    read = importer.read(path, graph)
    import onnx

    from kedge_targets.graph import model_writer

    model = onnx.load_model(str(graph))
    free = axes.rename_axes(model)
    facts = {one.key: one.value for one in model.metadata_props if one.key in importer.metadata}
    model_writer.strip(model)
    onnx.helper.set_model_props(model, facts)
    model_writer.save(model, graph)
    found, size = digests.of_path(path)
    return Imported(
        graph=str(graph),
        kind=importer.kind(path) or "",
        notes=(*read.notes, *_fix(graph, request, free)),
        tools=read.tools,
        source_digest=found,
        size_bytes=size,
    )


def _samples(request: ImportRequest) -> dict[str, Array]:
    return {name: np.load(path, allow_pickle=False) for name, path in request.inputs.items()}


def _compare(
    graph: Path,
    names: list[str],
    arrays: list[Array],
    framework: Callable[[Mapping[str, Array]], list[Array]],
    request: ImportRequest,
) -> None:
    import onnx

    model = onnx.load_model(str(graph))
    shapes = {
        value.name: [dim.dim_value if dim.dim_value > 0 else dim.dim_param for dim in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    # An input that nothing depends on is gone from the graph.
    feeds = [
        {name: array for name, array in feed.items() if name in shapes}
        for feed in agreement.varied(names, arrays, {**dict.fromkeys(names, ()), **shapes})
    ]
    agreement.check(graph, feeds, framework, where=request.source)


def _fix(graph: Path, request: ImportRequest, free: tuple[str, ...]) -> tuple[str, ...]:
    """Fix the batch of a written graph if requested; return the notes on what is free and what is not."""
    if request.batch is not None and axes.BATCH in free:
        from kedge_targets.graph import model_reader

        notes = _fixed(model_reader.load(graph), request.batch, graph, request.source)
        free = tuple(name for name in free if name != axes.BATCH)
    else:
        notes = _own_batch(graph, request) if axes.BATCH not in free and request.batch is None else ()
    return (*notes, f"free axes: {', '.join(free)}") if free else (*notes, "free axes: none")


def _own_batch(graph: Path, request: ImportRequest) -> tuple[str, ...]:
    from kedge_targets.graph import batch, model_reader

    try:
        found = batch.size(model_reader.load(graph))
    except ModelError as error:
        raise ModelError(error.what, where=f"{request.source}: {error.where}", remedy=error.remedy) from error
    return (f"the model's own batch is {found}",) if found is not None else ()


def _fixed(model: Any, samples: int, graph: Path, where: str) -> tuple[str, ...]:
    from kedge_targets.graph import batch, model_writer

    try:
        fixed = batch.fix_batch(model, samples)
    except ModelError as error:
        raise ModelError(error.what, where=error.where or where, remedy=error.remedy) from error
    model_writer.save(fixed, graph)
    return (f"batch fixed to {samples} on request",)


_READERS: dict[Kind, Callable[[ImportRequest, Progress], Imported]] = {
    Kind.ONNX: _onnx,
    Kind.UNKNOWN: _unknown,
    Kind.FACTORY: _factory,
    Kind.EXPORTED: _exported,
    Kind.KERAS: _keras,
    Kind.PICKLED: _pickled,
    Kind.TRANSFORMERS: _transformers,
}

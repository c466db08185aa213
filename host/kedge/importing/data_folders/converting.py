"""The worker's task that runs a listed data set through the model's pipeline item by item into ``.npy`` files, so that
memory use does not grow with the number of items."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.importing.data_folders import kinds, npy_stream
from kedge.importing.data_folders.examples import write_examples
from kedge.importing.data_folders.listing import Item, Listing, Truth
from kedge.importing.data_folders.npy_stream import NpyStream
from kedge_protocol.bundle.pipeline import Fit, Pipeline
from kedge_protocol.errors import ConfigError, DatasetError, KedgeError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline.execution import Context, Runner
from kedge_targets.worker import Progress

Array = npt.NDArray[Any]

TASK = "kedge.importing.data_folders.converting:convert"
_BOX_FIELDS = 6
_SEVERAL, _NAMED = 2, 20
_CHUNK = 64
"""The number of items prepared together."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The other role's data set; see :class:`ConvertRequest`."""

    path: str
    role: str
    most: int | None = None


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """A request to turn a data set into arrays.

    Attributes:
        path: the absolute path of the data set.
        role: ``calibration`` or ``evaluation``.
        annotations: COCO JSON for a folder of pictures.
        pipeline: the settled pipeline.
        names: the model's class names, if any.
        most: the maximum number of items, spread evenly; None for all.
        folder: an empty folder that outlives the call.
        examples: the maximum number of raw items kept as the bundle's examples.
        beside: the other data set, whose texts get the same length: a target of fixed sizes takes no others.
    """

    path: str
    role: str
    pipeline: Pipeline
    inputs: tuple[TensorInfo, ...]
    folder: str
    annotations: str | None = None
    names: tuple[str, ...] = ()
    most: int | None = None
    examples: int = 0
    beside: Beside | None = None


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The result of a conversion.

    Attributes:
        arrays: input name (and ``label``, if there are labels) → ``.npy`` file.
        samples: the number of converted samples, out of ``found``.
        kind: the kind of the data set, in words.
        classes: the class names, in the order of the labels.
        examples: the folder of raw items; None if none were requested.
        left_out: names of files in a format that pipelines do not read; empty for none.
    """

    arrays: dict[str, str]
    samples: int
    found: int
    kind: str
    classes: tuple[str, ...] = ()
    examples: str | None = None
    left_out: str = ""


def convert(request: ConvertRequest, progress: Progress) -> Converted:
    """Read, preprocess and write a data set.

    Raises:
        DatasetError: the data set is invalid; the message names the file.
        ConfigError: the pipeline takes another kind of item.
        MissingDependencyError: a package that reads them is not installed.
        StorageError: the disk is full.
    """
    annotations = None if request.annotations is None else Path(request.annotations)
    whole = kinds.listed(Path(request.path), request.role, annotations=annotations)
    listing = whole.picked(request.most).under(request.names)
    _check_item(listing, request.pipeline)
    runner = Runner(of_one_size(request.pipeline), request.inputs, (), read_text)
    folder = Path(request.folder)
    rows: list[Array] = []
    free = {spec.name for spec in request.inputs if None in spec.shape[1:]}
    with contextlib.ExitStack() as stack:
        streams: dict[str, NpyStream] = {}
        for number, (feeds, context) in enumerate(_prepared(listing, runner, request.beside), start=1):
            for name, array in feeds.items():
                if name not in streams:
                    path = folder / f"{len(streams)}.npy"
                    expected = len(listing.sources)
                    made = NpyStream(path, where=listing.where, expected=expected, unlike=name in free)
                    streams[name] = stack.enter_context(made)
                streams[name].add(array[0])
            if listing.truth is Truth.BOXES:
                rows.append(_boxes(listing.labels[number - 1], context))
            progress(request.role, number, len(listing.sources))
    arrays = {name: str(path) for name, path in npy_stream.files(streams).items()}
    if listing.truth is not Truth.NOTHING:
        arrays["label"] = str(folder / "label.npy")
        np.save(arrays["label"], _labels(listing, rows))
    examples = None
    if request.examples:
        examples = write_examples(listing.picked(request.examples).sources, request.pipeline, folder / "examples")
    return Converted(
        arrays=arrays,
        samples=len(listing.sources),
        found=len(whole.sources),
        kind=whole.kind,
        classes=listing.classes,
        examples=examples,
        left_out=_named(whole.left_out),
    )


def _named(files: Sequence[Path]) -> str:
    more = f", … ({len(files)} in all)" if len(files) > _NAMED else ""
    return ", ".join(one.name for one in files[:_NAMED]) + more


def of_one_size(pipeline: Pipeline) -> Pipeline:
    """Return a pipeline whose pictures all have the stated size, since the samples of a data set lie in one array."""
    picture = pipeline.picture
    if picture is None:
        return pipeline
    fit = Fit.LETTERBOX if picture.fit is Fit.FREE else picture.fit
    return replace(pipeline, picture=replace(picture, fit=fit, widest=0))


def _check_item(listing: Listing, pipeline: Pipeline) -> None:
    section = {Item.PICTURE: pipeline.picture, Item.SOUND: pipeline.sound, Item.TEXT: pipeline.text}[listing.item]
    if section is None:
        raise ConfigError(
            f"holds {listing.item.value}, the pipeline {pipeline.task.value} takes others",
            where=listing.where,
            remedy="Give another --task or --pipeline",
        )
    if listing.truth is Truth.BOXES and pipeline.boxes is None:
        raise ConfigError(
            f"holds boxes, the pipeline {pipeline.task.value} gives none",
            where=listing.where,
            remedy="Give --task detection",
        )


def _prepared(listing: Listing, runner: Runner, beside: Beside | None) -> Iterator[tuple[dict[str, Array], Context]]:
    """Yield items as the model takes them, in order; decoding releases the GIL, so several threads help."""
    if listing.item is Item.TEXT:
        yield from _texts(listing, runner, beside)
        return

    def one(source: Path | str) -> tuple[dict[str, Array], Context]:
        try:
            return runner.prepare(source, where=str(source))
        except KedgeError as error:
            if error.where is None or listing.where in error.where:
                raise
            raise DatasetError(f"{error.where}: {error.what}", where=listing.where, remedy=error.remedy) from error

    first = one(listing.sources[0])  # what is missing here is missing for all, and is said by its own error
    yield first
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        for start in range(1, len(listing.sources), _CHUNK):
            try:
                yield from pool.map(one, listing.sources[start : start + _CHUNK])
            except DatasetError as error:
                raise _with_others(error, listing.sources[start:], one, pool) from error


def _with_others(
    first: DatasetError, sources: Sequence[Path | str], read: Callable[[Path | str], Any], pool: ThreadPoolExecutor
) -> DatasetError:
    """Return the error of the first damaged item with the names of all further ones, so that one look is enough."""

    def damaged(source: Path | str) -> bool:
        try:
            read(source)
        except DatasetError:
            return True
        return False

    bad = [Path(one).name for one, is_bad in zip(sources, pool.map(damaged, sources), strict=True) if is_bad]
    if len(bad) < _SEVERAL:
        return first
    more = f"; {len(bad)} of {len(sources)} are damaged: {', '.join(bad[:_NAMED])}{', …' if len(bad) > _NAMED else ''}"
    return DatasetError(first.what + more, where=first.where, remedy=first.remedy)


def _texts(listing: Listing, runner: Runner, beside: Beside | None) -> Iterator[tuple[dict[str, Array], Context]]:
    """Return the tokens of all texts, padded to one length: the bucket of the longest of both data sets."""
    encode = runner.tokenizer()
    every = [listing]
    if beside is not None:
        other = kinds.listed(Path(beside.path), beside.role).picked(beside.most)
        every += [other] if other.item is Item.TEXT else []
    longest = max(len(encode(str(text)).ids) for one in every for text in one.sources)
    for text in listing.sources:
        yield runner.tokens([encode(str(text))], least=longest), Context()


def _boxes(rows: Sequence[Sequence[float]], context: Context) -> Array:
    """Return the picture's boxes as fractions of the model's input."""
    made = np.asarray(rows, dtype=np.float32).reshape(-1, _BOX_FIELDS)
    if len(made) and context.placement is not None:
        made[:, 1:5] = context.placement.to_input(made[:, 1:5])
    return made


def _labels(listing: Listing, boxes: Sequence[Array]) -> Array:
    if listing.truth is Truth.CLASS:
        return np.asarray(listing.labels, dtype=np.int64)
    if listing.truth is Truth.TEXT:
        return np.asarray(listing.labels, dtype=np.str_)
    most = max(1, *(len(one) for one in boxes)) if boxes else 1
    made = np.zeros((len(boxes), most, _BOX_FIELDS), dtype=np.float32)
    made[..., 0] = -1
    for number, one in enumerate(boxes):
        made[number, : len(one)] = one
    return made


def read_text(path: str) -> str:
    """Read a tokenizer's file.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"cannot be read: {error}", where=path, remedy="Put tokenizer.json beside the model, or name it in [text]"
        ) from error

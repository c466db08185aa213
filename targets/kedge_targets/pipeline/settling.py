"""Settles a declared pipeline: takes open values from the model and checks stated values against it."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from kedge_protocol.bundle.pipeline import (
    Activation,
    Colour,
    Embedding,
    Features,
    Fit,
    Picture,
    Pipeline,
    Pooling,
    Regions,
    Scores,
    Task,
)
from kedge_protocol.bundle.preprocess import Preprocess
from kedge_protocol.errors import ConfigError
from kedge_protocol.topics import checked_name
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline.declaration import OUTPUTS, READY
from kedge_targets.pipeline.text import USUAL

_CHANNELS = (1, 3)
_USUAL_SIZES = {Fit.LINE: {"W": 320, "H": 48}, Fit.FREE: {"W": 736, "H": 736}}
"""Sizes of inputs that a model leaves free, as PaddleOCR's models for reading text have them."""
_DIRECTION_WIDTH = 192
_WIDEST = 3200
_MAP, _CLASSES = 4, 2
"""Ranks of outputs."""
_BUCKETS = (16, 32, 64, 128, 256, 512)
_TASKS = {"detect": Task.DETECTION, "classify": Task.CLASSIFICATION, "segment": None, "pose": None, "obb": None}
"""Ultralytics' tasks; None for those without a ready pipeline."""


def from_metadata(metadata: Mapping[str, str]) -> Pipeline | None:
    """Return the pipeline that an Ultralytics export states in its metadata (``task``, ``imgsz``, ``stride``), or None
    if it states no known one."""
    task = _TASKS.get(metadata.get("task", ""))
    if task is None or "stride" not in metadata:
        return None
    ready = READY[task]
    width, height = _image_size(metadata)
    if ready.picture is None:
        return None
    picture = replace(ready.picture, width=width, height=height)
    if task is Task.CLASSIFICATION:
        # Ultralytics' classifiers are trained on 0..1, cut from the whole shorter side.
        return replace(ready, picture=replace(picture, crop_share=1.0), normalize=Preprocess(scale=(1 / 255,)))
    return replace(ready, picture=picture)


def names_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return the class names in an export's metadata (``names`` of Ultralytics: ``{0: 'person', ...}`` or a list;
    ``character`` of PaddleOCR: one a line); empty if there are none."""
    if "character" in metadata:
        return tuple(metadata["character"].splitlines())
    names = _literal(metadata.get("names", ""))
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        return tuple(str(names[number]) for number in range(len(names)))
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def settled(
    pipeline: Pipeline,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    *,
    where: str,
    metadata: Mapping[str, str] | None = None,
) -> Pipeline:
    """Return a pipeline in which everything that the model's inputs and outputs determine is filled in.

    Args:
        where: the option or file, for messages.
        metadata: the export's metadata.

    Raises:
        ConfigError: the pipeline does not fit the model.
    """
    if pipeline.task is Task.OCR:
        pipeline = _ocr(pipeline, inputs, outputs, metadata or {})
    pictured = any(len(info.shape) == 4 for info in inputs)
    if pipeline.task is Task.EMBEDDING and pipeline.text is not None and pictured:
        ready = READY[Task.CLASSIFICATION]
        pipeline = replace(pipeline, text=None, picture=ready.picture, normalize=ready.normalize)
    if pipeline.picture is not None:
        pipeline = replace(pipeline, picture=_picture(pipeline.picture, inputs, where, metadata or {}))
    elif pipeline.sound is not None:
        pipeline = _sound(pipeline, inputs, where)
    elif pipeline.text is not None:
        pipeline = _text(pipeline, inputs, where)
    if pipeline.then is not None:
        checked_name(pipeline.then.model, "model name")
        if pipeline.then.turned_by:
            checked_name(pipeline.then.turned_by, "model name")
    return _outputs(pipeline, outputs, where)


def probable(pipeline: Pipeline, bounded: Mapping[str, bool], first: str) -> Pipeline:
    """Fill in the activation if the pipeline leaves it open: softmax, unless the float model's scores are
    probabilities.

    Args:
        bounded: output → whether its numbers are known to be probabilities.
        first: the model's first output.
    """
    if pipeline.scores is None or pipeline.scores.activation is not None:
        return pipeline
    known = bounded.get(pipeline.scores.output or first, False)
    return replace(
        pipeline, scores=replace(pipeline.scores, activation=Activation.NONE if known else Activation.SOFTMAX)
    )


def _ocr(
    pipeline: Pipeline,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    metadata: Mapping[str, str],
) -> Pipeline:
    """Return the pipeline of one of the three models that read text. The rank of the output tells which, unless the
    user states an output section: a map of where text is, scores of its direction, or characters step by step."""
    picture, rank = pipeline.picture, len(outputs[0].shape)
    ready = pipeline.sequence == READY[Task.OCR].sequence
    if picture is None:
        return pipeline
    if pipeline.regions is not None or (ready and rank == _MAP):
        fit = Fit.FREE if picture.fit is Fit.LINE else picture.fit
        regions = pipeline.regions or Regions()
        return replace(pipeline, sequence=None, picture=replace(picture, fit=fit), regions=regions)
    if pipeline.scores is not None or (ready and rank == _CLASSES):
        free = [axis for info in inputs[:1] for axis in info.shape[1:] if axis is None]
        width = picture.width or (_DIRECTION_WIDTH if free else 0)
        return replace(
            pipeline, sequence=None, picture=replace(picture, width=width), scores=pipeline.scores or Scores()
        )
    if pipeline.sequence is not None and ready:
        # A space follows the alphabet that an export states if there is a class for it, besides the blank's.
        space = outputs[0].shape[-1] == len(names_of(metadata)) + 2
        pipeline = replace(pipeline, sequence=replace(pipeline.sequence, space=space))
    return replace(pipeline, picture=replace(picture, widest=picture.widest or _WIDEST))


def _picture(how: Picture, inputs: Sequence[TensorInfo], where: str, metadata: Mapping[str, str]) -> Picture:
    info = _input(how.input, [one for one in inputs if len(one.shape) == 4], "picture", inputs, where)
    layout = how.layout or info.layout or _layout(info)
    if layout not in ("NCHW", "NHWC"):
        raise ConfigError(
            f"nothing tells which axis of input {info.name!r} holds the channels",
            where=where,
            remedy='State [picture] layout = "NCHW" or "NHWC"',
        )
    sizes = dict(zip(layout, info.shape, strict=True))
    exported = dict(zip("WH", _image_size(metadata), strict=True))
    found = {}
    for axis, stated in (("W", how.width), ("H", how.height)):
        known = sizes[axis] or 0
        if stated and known and stated != known:
            raise ConfigError(
                f"{stated} pixels are stated, input {info.name!r} has {known} ({axis} of {layout})", where=where
            )
        found[axis] = known or stated or exported[axis] or _USUAL_SIZES.get(how.fit, {}).get(axis, 0)
        if not found[axis]:
            raise ConfigError(
                f"the size of input {info.name!r} is free", where=where, remedy="State [picture] width and height"
            )
    channels = sizes["C"] or 3
    grey = channels == 1
    colour = how.colour or (Colour.GREY if grey else Colour.RGB)
    if channels not in _CHANNELS or grey != (colour is Colour.GREY):
        raise ConfigError(f"input {info.name!r} has {channels} channels, {colour.value} has not", where=where)
    return replace(how, input=info.name, layout=layout, width=found["W"], height=found["H"], colour=colour)


def _layout(info: TensorInfo) -> str:
    first, last = info.shape[1] in _CHANNELS, info.shape[3] in _CHANNELS
    return ("NCHW" if first else "NHWC") if first != last else ""


def _sound(pipeline: Pipeline, inputs: Sequence[TensorInfo], where: str) -> Pipeline:
    how = pipeline.sound
    if how is None:
        return pipeline
    info = _input(how.input, inputs, "sound", inputs, where)
    inner = [axis for axis in info.shape[1:] if axis != 1]
    samples = how.samples
    if how.features is Features.WAVEFORM:
        if len(inner) != 1:
            raise ConfigError(
                f"input {info.name!r} has {len(inner)} axes, a waveform has one",
                where=where,
                remedy='State [sound] features = "log-mel" or "mfcc"',
            )
        samples = inner[0] or samples
    else:
        width = how.mels if how.features is Features.LOG_MEL else how.coefficients
        if len(inner) != 2 or width not in inner:
            raise ConfigError(f"input {info.name!r} has no axis of {width} features", where=where)
        frames = inner[0] if inner[1] == width else inner[1]
        samples = samples or ((frames - 1) * how.hop + how.frame if frames else 0)
        made = (samples - how.frame) // how.hop + 1 if samples else frames
        if frames is not None and made != frames:
            raise ConfigError(f"{samples} samples make {made} frames, input {info.name!r} has {frames}", where=where)
    if not samples:
        raise ConfigError(
            f"the length of input {info.name!r} is free", where=where, remedy="State [sound] samples = ..."
        )
    return replace(pipeline, sound=replace(how, input=info.name, samples=samples))


def _text(pipeline: Pipeline, inputs: Sequence[TensorInfo], where: str) -> Pipeline:
    how = pipeline.text
    if how is None:
        return pipeline
    names = [info.name for info in inputs]
    found = {}
    for part, usual in USUAL.items():
        stated = getattr(how, part)
        if stated and stated not in names:
            raise ConfigError(f"{stated!r} is no input of the model", where=where, remedy=f"It has {', '.join(names)}")
        found[part] = stated or next((name for name in usual if name in names), "")
    if not found["ids"] and len(names) == 1:
        found["ids"] = names[0]
    left = [name for name in names if name not in found.values()]
    if not found["ids"] or left:
        raise ConfigError(
            f"nothing tells what input {(left or names)[0]!r} takes of a text",
            where=where,
            remedy="Name the model's inputs as [text] ids, mask and types",
        )
    shape = next(info.shape for info in inputs if info.name == found["ids"])
    fixed = shape[1] if len(shape) > 1 else None
    longest = fixed or how.max_length
    buckets = () if fixed else how.buckets or (*(one for one in _BUCKETS if one < longest), longest)
    return replace(
        pipeline,
        text=replace(
            how, ids=found["ids"], mask=found["mask"], types=found["types"], max_length=longest, buckets=buckets
        ),
    )


def _outputs(pipeline: Pipeline, outputs: Sequence[TensorInfo], where: str) -> Pipeline:
    names = [info.name for info in outputs]
    for name in OUTPUTS:
        section = getattr(pipeline, name)
        stated = getattr(section, "output", "")
        if stated and stated not in names:
            raise ConfigError(
                f"[{name}] output {stated!r} is no output of the model",
                where=where,
                remedy=f"It has {', '.join(names)}",
            )
    if pipeline.embedding is not None:
        pipeline = replace(pipeline, embedding=_embedding(pipeline.embedding, outputs))
    return pipeline


def _embedding(how: Embedding, outputs: Sequence[TensorInfo]) -> Embedding:
    if how.pooling is not None:
        return how
    info = next((one for one in outputs if one.name == how.output), outputs[0])
    return replace(how, pooling=Pooling.MEAN if len(info.shape) == 3 else Pooling.NONE)


def _input(
    stated: str, fitting: Sequence[TensorInfo], what: str, inputs: Sequence[TensorInfo], where: str
) -> TensorInfo:
    names = ", ".join(info.name for info in inputs)
    if stated:
        found = [info for info in inputs if info.name == stated]
        if not found:
            raise ConfigError(f"{stated!r} is no input of the model", where=where, remedy=f"It has {names}")
        return found[0]
    if len(fitting) != 1 or len(inputs) != 1:
        raise ConfigError(
            f"the model has the inputs {names}: none of them, or not one alone, takes a {what}",
            where=where,
            remedy=f"A pipeline of a {what} needs a model with one such input",
        )
    return fitting[0]


def _image_size(metadata: Mapping[str, str]) -> tuple[int, int]:
    """Return the width and height in ``imgsz`` (height, width); zeros if it states none."""
    size = _literal(metadata.get("imgsz", ""))
    if isinstance(size, int) and size > 0:
        return size, size
    if isinstance(size, list) and len(size) == 2 and all(isinstance(one, int) and one > 0 for one in size):
        return size[1], size[0]
    return 0, 0


def _literal(text: str) -> Any:
    with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return None

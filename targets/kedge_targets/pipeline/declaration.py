"""Reads a pipeline as users declare it: TOML, or one of the ready ones.

A file names its ``task`` and states what differs from the task's ready pipeline::

    task = "detection"

    [picture]
    fit = "stretch"

    [normalize]
    scale = "1/255"

    [boxes]
    score_floor = 0.4
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kedge_protocol import codec, toml
from kedge_protocol.bundle.pipeline import (
    Boxes,
    Colour,
    Embedding,
    Fit,
    Mask,
    Picture,
    Pipeline,
    Scores,
    Sequence,
    Sound,
    Task,
    Text,
)
from kedge_protocol.bundle.preprocess import Preprocess
from kedge_protocol.errors import ConfigError, KedgeError

INPUTS = ("picture", "sound", "text")
OUTPUTS = ("scores", "boxes", "regions", "mask", "sequence", "embedding")
_SHARE = Preprocess(scale=(1 / 255,))
_IMAGENET = Preprocess(scale=(1 / 255,), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
"""The normalization of torchvision's, timm's and most other picture models."""

READY: dict[Task, Pipeline] = {
    Task.CLASSIFICATION: Pipeline(
        task=Task.CLASSIFICATION,
        picture=Picture(fit=Fit.CROP, crop_share=0.875),
        normalize=_IMAGENET,
        scores=Scores(),
    ),
    Task.DETECTION: Pipeline(
        task=Task.DETECTION, picture=Picture(fit=Fit.LETTERBOX, antialias=False), normalize=_SHARE, boxes=Boxes()
    ),
    Task.SEGMENTATION: Pipeline(task=Task.SEGMENTATION, picture=Picture(), normalize=_IMAGENET, mask=Mask()),
    Task.EMBEDDING: Pipeline(task=Task.EMBEDDING, text=Text(), embedding=Embedding()),
    Task.TEXT_CLASSIFICATION: Pipeline(task=Task.TEXT_CLASSIFICATION, text=Text(), scores=Scores()),
    Task.AUDIO_CLASSIFICATION: Pipeline(task=Task.AUDIO_CLASSIFICATION, sound=Sound(), scores=Scores()),
    # Settled further by the model's outputs: one that finds text, one that says which way up it is, or one that reads.
    Task.OCR: Pipeline(
        task=Task.OCR,
        picture=Picture(fit=Fit.LINE, fill=127, antialias=False, colour=Colour.BGR),
        normalize=Preprocess(scale=(1 / 255,), mean=(0.5,), std=(0.5,)),
        sequence=Sequence(),
    ),
}
"""The ready pipelines; ``embedding`` of a model that takes pictures has the picture of ``classification``."""


def read(path: Path) -> Pipeline:
    """Read a declared pipeline.

    Raises:
        ConfigError: the file does not exist, is not TOML or is invalid; the message names section and key.
    """
    where = str(path)
    pipeline = declared(toml.read(path, ConfigError), where=where)
    # The files that it names lie beside it.
    beside = path.absolute().parent
    if pipeline.then is not None and pipeline.then.releases:
        releases = tuple(str(beside / one) for one in pipeline.then.releases)
        pipeline = dataclasses.replace(pipeline, then=dataclasses.replace(pipeline.then, releases=releases))
    if pipeline.text is None:
        return pipeline
    tokenizer = str(beside / pipeline.text.tokenizer)
    return dataclasses.replace(pipeline, text=dataclasses.replace(pipeline.text, tokenizer=tokenizer))


def declared(data: Mapping[str, Any], *, where: str) -> Pipeline:
    """Return a pipeline from plain data: its values on top of the ready pipeline of its task.

    Raises:
        ConfigError: the data is invalid.
    """
    try:
        task = Task(data.get("task", ""))
    except ValueError as error:
        known = ", ".join(one.value for one in Task)
        raise ConfigError(
            f"{data.get('task')!r} is no task" if "task" in data else "names no task",
            where=where,
            remedy=f'Begin with task = "..."; known are {known}',
        ) from error
    merged: dict[str, Any] = codec.unstructure(READY[task])
    for group in (INPUTS, OUTPUTS):
        stated = [name for name in group if name in data]
        if len(stated) > 1:
            raise ConfigError(f"states both [{stated[0]}] and [{stated[1]}]", where=where, remedy="Keep one of them")
        for name in group if stated else ():
            if name not in stated:
                merged.pop(name, None)
    for name, section in data.items():
        own = dict(section) if isinstance(section, Mapping) else section
        if name == "normalize" and isinstance(own, dict):
            own = {key: _numbers(value, f"{where}: {name}.{key}") for key, value in own.items()}
            merged[name] = own
        elif isinstance(own, dict):
            merged[name] = {**merged.get(name, {}), **own}
        else:
            merged[name] = own
    try:
        pipeline = codec.structure(merged, Pipeline, where=where, strict=True)
    except ConfigError:
        raise
    except KedgeError as error:
        raise ConfigError(error.what, where=error.where, remedy=error.remedy) from error
    _check(pipeline, where)
    return pipeline


def _numbers(value: Any, where: str) -> Any:
    """Read the numbers of ``[normalize]``: one or a list of them; ``"1/255"`` is a number too."""
    return [_number(one, where) for one in (value if isinstance(value, list) else [value])]


def _number(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    above, slash, below = value.partition("/")
    try:
        number = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{value!r} is no number", where=where, remedy='Write 0.00392 or "1/255"') from error
    return number


def _check(pipeline: Pipeline, where: str) -> None:
    """Check values that the types allow but that are invalid."""
    problems: list[tuple[str, bool, str]] = []
    if (picture := pipeline.picture) is not None:
        problems += [
            ("picture.width and picture.height", min(picture.width, picture.height) >= 0, "pixels, 0 or more"),
            ("picture.crop_share", 0 < picture.crop_share <= 1, "a share above 0, at most 1"),
            ("picture.fill", 0 <= picture.fill <= 255, "0 to 255"),
            ("picture.widest", picture.widest >= 0, "pixels, 0 or more"),
            ("picture.shortest and picture.longest", 1 <= picture.shortest <= picture.longest <= 1 << 14, "pixels"),
            ("picture.multiple", 1 <= picture.multiple <= picture.longest, "1 or more"),
            ("picture.layout", picture.layout in ("", "NCHW", "NHWC"), "NCHW or NHWC"),
        ]
    if (sound := pipeline.sound) is not None:
        top = sound.high or sound.sample_rate / 2
        problems += [
            ("sound.sample_rate", 100 <= sound.sample_rate <= 768_000, "hertz, 100 to 768000"),
            ("sound.samples", sound.samples >= 0, "0 or more"),
            ("sound.frame and sound.hop", min(sound.frame, sound.hop) >= 1, "1 or more"),
            ("sound.fft", sound.fft == 0 or sound.fft >= sound.frame, "0, or at least sound.frame"),
            ("sound.mels", 1 <= sound.mels <= 1024, "1 to 1024"),
            ("sound.coefficients", 1 <= sound.coefficients <= sound.mels, "1 to sound.mels"),
            ("sound.low and sound.high", 0 <= sound.low < top <= sound.sample_rate / 2, "0 up to half the rate"),
            ("sound.floor", sound.floor > 0, "above 0"),
        ]
    if (text := pipeline.text) is not None:
        rising = list(text.buckets) == sorted(set(text.buckets)) and all(one > 0 for one in text.buckets)
        last = not text.buckets or text.buckets[-1] == text.max_length
        problems += [
            ("text.max_length", 1 <= text.max_length <= 1 << 20, "tokens, 1 or more"),
            ("text.buckets", rising and last, "ascending lengths, the last of them text.max_length"),
        ]
    if (boxes := pipeline.boxes) is not None:
        problems += [
            ("boxes.score_floor", 0 <= boxes.score_floor <= 1, "0 to 1"),
            ("boxes.iou_limit", 0 <= boxes.iou_limit <= 1, "0 to 1"),
            ("boxes.most", boxes.most >= 1, "1 or more"),
        ]
    if (scores := pipeline.scores) is not None:
        problems += [("scores.top", scores.top >= 1, "1 or more")]
    if (normalize := pipeline.normalize) is not None:
        every = (*normalize.scale, *normalize.mean, *normalize.std)
        problems += [("normalize", all(map(math.isfinite, every)) and 0.0 not in normalize.std, "finite; no std of 0")]
    problems += _later_rules(pipeline)
    for key, fine, form in problems:
        if not fine:
            raise ConfigError(f"{key}: {form} was expected", where=where)


def _is_server(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _later_rules(pipeline: Pipeline) -> list[tuple[str, bool, str]]:
    """Return key, whether its value is valid, and its form, for regions and for what other models do."""
    problems: list[tuple[str, bool, str]] = []
    if (regions := pipeline.regions) is not None:
        problems += [
            ("regions.threshold", 0 < regions.threshold < 1, "above 0, below 1"),
            ("regions.score_floor", 0 <= regions.score_floor <= 1, "0 to 1"),
            ("regions.grow", 0 <= regions.grow <= 10, "0 to 10"),
            ("regions.most", regions.most >= 1, "1 or more"),
        ]
    if (then := pipeline.then) is not None:
        # A task for text finds regions if the model does; see kedge_targets.pipeline.settling.
        parts = pipeline.boxes or pipeline.regions or pipeline.task is Task.OCR
        problems += [
            ("then", bool(parts), "only with [boxes] or [regions]"),
            ("then.turned_above", 0 <= then.turned_above <= 1, "0 to 1"),
            ("then.answer_floor", 0 <= then.answer_floor <= 1, "0 to 1"),
        ]
    if (cascade := pipeline.cascade) is not None:
        below = 0.5 if cascade.below is None else cascade.below
        problems += [
            ("cascade", pipeline.scores is not None, "only with [scores]"),
            ("cascade.url", _is_server(cascade.url), "http://host:port or https://host:port"),
            ("cascade.model", bool(cascade.model), "the larger model's name"),
            ("cascade.share", 0 < cascade.share <= 1, "above 0, at most 1"),
            ("cascade.deadline_ms", 1 <= cascade.deadline_ms <= 600_000, "milliseconds, 1 to 600000"),
            ("cascade.below", 0 <= below <= 1, "0 to 1"),
        ]
    return problems

"""Runs a pipeline from an application's raw data to its answer; host and device run this same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.pipeline import Fit, Picture, Pipeline, Text
from kedge_protocol.errors import BundleError, InputError
from kedge_targets.pipeline import audio, boxes, chains, embeddings, masks, pictures, regions, scores, sequences, text
from kedge_targets.pipeline.answers import Box, Region
from kedge_targets.pipeline.pictures import Pixels, Placement

Array = npt.NDArray[Any]
Raw = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""A bare model: maps input name → samples with batch axis to output name → results with batch axis."""
Other = Callable[[str], Callable[[Any], Any]]
"""Returns another model of the same device by its name, as a function from raw data to its answer."""


class Tensor(Protocol):
    """What a pipeline must know of an input; the first axis of the shape is the batch."""

    @property
    def name(self) -> str:
        """The input's name."""

    @property
    def shape(self) -> tuple[int | None, ...]:
        """The input's shape with the batch axis."""


@dataclass(frozen=True)
class Context:
    """The part of the raw data that is kept until the model has answered.

    Attributes:
        pixels: the picture's pixels.
        placement: the picture's place in the input.
        mask: the mask of a text's tokens.
        feeds: the model's inputs, for a larger model.
    """

    pixels: Pixels | None = None
    placement: Placement | None = None
    mask: Array | None = None
    feeds: Mapping[str, Array] | None = None


class Runner:
    """The runnable pipeline of one model.

    Args:
        pipeline: the settled pipeline, as stored in a bundle.
        inputs: the model's inputs.
        labels: the class names.
        read: returns the text of a file that the pipeline names (``tokenizer.json``); called on first use.
    """

    def __init__(
        self, pipeline: Pipeline, inputs: Sequence[Tensor], labels: Sequence[str], read: Callable[[str], str]
    ) -> None:
        self.pipeline = pipeline
        self.labels = tuple(labels)
        self._shapes = {spec.name: spec.shape for spec in inputs}
        self._first = inputs[0].name
        self._picture = None if pipeline.picture is None else self._sized(pipeline.picture)
        self._read = read
        self._tokenizer: text.Tokenizer | None = None

    @classmethod
    def of(cls, folder: Path, config: BundleConfig) -> Runner | None:
        """Return the pipeline of a bundle whose files are in ``folder``, or None if it has none. Its files are read
        immediately, so the folder may be deleted."""
        if config.pipeline is None:
            return None
        texts = {}
        if config.pipeline.text is not None:
            title = config.pipeline.text.tokenizer
            try:
                texts[title] = (folder / title).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise BundleError(f"cannot be read: {error}", where=str(folder / title)) from error
        return cls(config.pipeline, config.inputs, config.labels, texts.__getitem__)

    def __call__(self, item: Any, raw: Raw, *, other: Other | None = None) -> Any:
        """Return the answer to one item, or a list of answers to a list of items.

        Args:
            item: a picture (path, bytes of a file, Pillow picture, array height x width x 3 of uint8), a sound (path
                or bytes of a wav file, array of samples, ``(samples, rate)``), or a text.
            raw: the bare model.
            other: other models, for a pipeline with ``then``.

        Raises:
            InputError: the item is none of these.
            MissingDependencyError: a package that the pipeline needs is not installed.
        """
        if isinstance(item, list):
            return [self(one, raw, other=other) for one in item]
        feeds, context = self.prepare(item)
        return self.finish(raw(feeds), context, other=other)

    def prepare(self, item: Any, *, where: str = "") -> tuple[dict[str, Array], Context]:
        """Return the model's inputs (raw samples, with a batch axis of 1) for one item.

        Args:
            where: the item's name in messages.
        """
        pipeline = self.pipeline
        if self._picture is not None:
            pixels = pictures.load(item, where=where)
            made, placement = pictures.place(pixels, self._picture)
            return {self._picture.input or self._first: made[np.newaxis]}, Context(pixels, placement)
        if pipeline.sound is not None:
            return self._sound(item, where)
        if pipeline.text is not None:
            return self._text(item)
        raise InputError("the pipeline takes nothing", remedy="Declare [picture], [sound] or [text]")

    def finish(self, outputs: Mapping[str, Array], context: Context, *, other: Other | None = None) -> Any:
        """Return the answer from the model's outputs for one item."""
        pipeline, labels = self.pipeline, self.labels
        if pipeline.boxes is not None:
            return self._followed(self._boxes(outputs, context), context, other)
        if pipeline.regions is not None and context.placement is not None:
            shown = _picked(outputs, pipeline.regions.output)[0]
            return self._followed(regions.decode(shown, pipeline.regions, context.placement), context, other)
        if pipeline.scores is not None:
            return scores.best(_picked(outputs, pipeline.scores.output)[0], pipeline.scores, labels)
        if pipeline.embedding is not None:
            return embeddings.vector(
                _picked(outputs, pipeline.embedding.output)[0], pipeline.embedding, _row(context.mask)
            )
        if pipeline.mask is not None and context.placement is not None:
            return masks.segments(_picked(outputs, pipeline.mask.output)[0], pipeline.mask, labels, context.placement)
        if pipeline.sequence is not None:
            found = _picked(outputs, pipeline.sequence.output)
            one = found[:, 0] if pipeline.sequence.time_first else found[0]
            return sequences.decode(one, pipeline.sequence, labels)
        return {name: array[0] for name, array in outputs.items()}

    def tokenizer(self) -> text.Tokenizer:
        """Return the pipeline's tokenizer, read on first use."""
        if self._tokenizer is None:
            how = self.pipeline.text
            if how is None:
                raise InputError("the pipeline takes no text")
            # A file of fixed length cuts texts as the tokenizer does, which keeps the token that ends them.
            fixed = self._fixed_length(how)
            cut = how if fixed is None else replace(how, max_length=min(how.max_length, fixed))
            self._tokenizer = text.Tokenizer(self._read(how.tokenizer), cut, where=how.tokenizer)
        return self._tokenizer

    def _fixed_length(self, how: Text) -> int | None:
        shape = self._shapes[how.ids]
        return shape[1] if len(shape) > 1 else None

    def tokens(self, encodings: Sequence[text.Encoding], *, least: int = 0) -> dict[str, Array]:
        """Return the model's inputs for some encoded texts, all padded to one length.

        Args:
            least: the length is at least that of a text with this many tokens.
        """
        how = self.pipeline.text
        if how is None:
            raise InputError("the pipeline takes no text")
        longest = max(least, *(len(one.ids) for one in encodings))
        made = text.filled(encodings, text.bucket(longest, how, self._fixed_length(how)), how)
        return {name: made[part] for part, name in (("ids", how.ids), ("mask", how.mask), ("types", how.types)) if name}

    def _text(self, item: Any) -> tuple[dict[str, Array], Context]:
        feeds = self.tokens([self.tokenizer()(item)])
        how = self.pipeline.text
        return feeds, Context(mask=feeds.get(how.mask) if how is not None else None)

    def _sound(self, item: Any, where: str) -> tuple[dict[str, Array], Context]:
        how = self.pipeline.sound
        if how is None:
            raise InputError("the pipeline takes no sound")
        name = how.input or self._first
        made = audio.features(audio.fitted(audio.load(item, how, where=where), how.samples), how)
        return {name: shaped(made, self._shapes[name])[np.newaxis]}, Context()

    def _sized(self, how: Picture) -> Picture:
        """Return the picture section as this file takes it: one with fixed sides leaves nothing free."""
        shape = self._shapes.get(how.input or self._first, ())
        sides = dict(zip(how.layout, shape, strict=True)) if len(shape) == len(how.layout) else {}
        width, height = sides.get("W"), sides.get("H")
        if how.fit is Fit.FREE and width and height:
            return replace(how, fit=Fit.LETTERBOX, width=width, height=height)
        return replace(how, width=width, widest=0) if how.fit is Fit.LINE and width else how

    def _boxes(self, outputs: Mapping[str, Array], context: Context) -> list[Box]:
        how, placement = self.pipeline.boxes, context.placement
        if how is None or placement is None:
            raise InputError("the pipeline has boxes without a picture")
        (found,) = boxes.decode(
            outputs,
            placement.input_size,
            head=how.head,
            shares=how.shares,
            score_floor=how.score_floor,
            iou_limit=how.iou_limit,
            most=how.most,
        )
        corners = placement.to_picture(found.boxes)
        return [
            Box(scores.name_of(int(kind), self.labels), int(kind), float(score), *(float(value) for value in corner))
            for corner, score, kind in zip(corners, found.scores, found.classes, strict=True)
        ]

    def _followed(self, found: list[Box] | list[Region], context: Context, other: Other | None) -> Any:
        how = self.pipeline.then
        if how is None or context.pixels is None:
            return found
        if other is None:
            raise InputError(f"the pipeline goes on to the model {how.model!r}, which is not there")
        return chains.followed(found, context.pixels, how, other)


def shaped(values: Array, shape: Sequence[int | None]) -> Array:
    """Return the features of one sample in the shape of the model's input without its batch: axes of length 1 are
    inserted, and frames x features is transposed if the input has features first.

    Raises:
        InputError: the features do not fit the input.
    """
    wanted = tuple(shape[1:])
    inner = [axis for axis in wanted if axis != 1]
    if values.ndim == 2 and len(inner) == 2 and not _fits(values.shape, inner) and _fits(values.shape[::-1], inner):
        values = values.T
    if not _fits(tuple(axis for axis in values.shape if axis != 1), inner):
        have, want = ("x".join("?" if axis is None else str(axis) for axis in one) for one in (values.shape, wanted))
        raise InputError(
            f"the pipeline makes {have}, the model takes {want}", remedy="Correct the pipeline's section [sound]"
        )
    whole = iter(axis for axis in values.shape if axis != 1)
    return np.ascontiguousarray(values.reshape([1 if axis == 1 else next(whole) for axis in wanted]))


def _fits(have: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(have) == len(wanted) and all(b is None or a == b for a, b in zip(have, wanted, strict=True))


def _picked(outputs: Mapping[str, Array], name: str) -> Array:
    return np.asarray(outputs[name] if name else next(iter(outputs.values())))


def _row(mask: Array | None) -> Array | None:
    return None if mask is None else mask[0]

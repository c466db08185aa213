"""Pipelines as data: how a picture, a sound or a text becomes a model's tensors, and its tensors an answer.

It is written by the user as TOML (``kedge compile --pipeline``), checked against the model when that is compiled, and
carried in the bundle's configuration. :mod:`kedge_targets.pipeline` runs it, on the host and on the device.

A pipeline has one input section (``picture``, ``sound`` or ``text``) and at most one output section (``scores``,
``boxes``, ``mask``, ``sequence`` or ``embedding``). Lengths of 0 mean "as the model has it"; a bundle holds none where
the model says more.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kedge_protocol.bundle.preprocess import Preprocess


class Task(str, enum.Enum):
    """The task of a pipeline. Each has a ready pipeline: ``kedge compile --task``."""

    CLASSIFICATION = "classification"
    DETECTION = "detection"
    SEGMENTATION = "segmentation"
    EMBEDDING = "embedding"
    TEXT_CLASSIFICATION = "text-classification"
    AUDIO_CLASSIFICATION = "audio-classification"
    OCR = "ocr"


class Fit(str, enum.Enum):
    """How a picture is fitted to the model's size."""

    STRETCH = "stretch"  # each side on its own
    LETTERBOX = "letterbox"  # the whole picture, its proportions kept, in the middle of a plain ground
    CROP = "crop"  # proportions kept, what hangs over is cut off on both sides
    LINE = "line"  # to the model's height, proportions kept, at the left of a plain ground: a line of text


class Filter(str, enum.Enum):
    """How pixels are interpolated."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"  # a = -0.5
    LANCZOS = "lanczos"  # three lobes


class Colour(str, enum.Enum):
    """The channels that the model takes, and their order."""

    RGB = "rgb"
    BGR = "bgr"
    GREY = "grey"  # ITU-R 601: (299 R + 587 G + 114 B) / 1000


class Features(str, enum.Enum):
    """The audio features that the model takes."""

    WAVEFORM = "waveform"
    LOG_MEL = "log-mel"
    MFCC = "mfcc"


class MelScale(str, enum.Enum):
    """The formula that converts hertz to mel."""

    HTK = "htk"  # 2595 log10(1 + f / 700)
    SLANEY = "slaney"  # linear below 1 kHz, logarithmic above; triangles of equal area


class Activation(str, enum.Enum):
    """The activation that turns an output into probabilities."""

    NONE = "none"
    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"


class Pooling(str, enum.Enum):
    """How the token vectors of a sentence are pooled."""

    NONE = "none"
    MEAN = "mean"  # over the tokens that are no padding
    FIRST = "first"


class Head(str, enum.Enum):
    """The format of a detector's boxes.

    Sources: the export of Ultralytics YOLOv8 and of YOLOv5; SSD (Liu et al., 2016, arXiv:1512.02325), with a background
    class in front; the ``TFLite_Detection_PostProcess`` operator of TensorFlow.
    """

    ANCHOR_FREE = "anchor-free"  # one output [N, 4 + C, A]: centre x, centre y, width, height; C probabilities
    OBJECTNESS = "objectness"  # one output [N, A, 5 + C]: the same, with the probability of any object in between
    SSD = "ssd"  # boxes [N, A, 4] as corners x1, y1, x2, y2, and scores [N, A, 1 + C]
    FINAL = "final"  # after suppression: boxes [N, D, 4] as y1, x1, y2, x2, classes [N, D], scores [N, D]
    ROWS = "rows"  # after suppression, or end to end: one output [N, D, 6] as x1, y1, x2, y2, score, class


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Converts a picture to uint8 pixels of the model's size.

    Attributes:
        width, height: pixels of the model's input.
        fit: how the picture comes to that size.
        crop_share: for ``crop``: share of the (scaled) picture's shorter side that is kept; 0.875 scales to 256 before
            224 are cut out.
        filter: of the scaling.
        antialias: where a picture is made smaller, whether the filter grows with it (as Pillow does; OpenCV does not).
        fill: 0..255, of the ground of ``letterbox`` and ``line``.
        colour: of the model's input; by default RGB, grey where it has one channel.
        layout: of the model's input; by default what its graph or its shape tells.
        input: the model's input; its only one where that is not said.
    """

    width: int = 0
    height: int = 0
    fit: Fit = Fit.STRETCH
    crop_share: float = 1.0
    filter: Filter = Filter.BILINEAR
    antialias: bool = True
    fill: int = 114
    colour: Colour | None = None
    layout: str = ""
    input: str = ""


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Converts a sound to samples in -1..1, or to features of frames.

    Attributes:
        sample_rate: hertz; other rates are resampled.
        samples: of one call; a longer sound is cut, a shorter one filled with silence. 0 takes what the model's input
            has, or the sound as it is where that is free.
        features: see :class:`Features`.
        frame, hop: samples of one frame, and from one frame to the next.
        fft: length of the Fourier transform; 0 is the next power of two from ``frame``.
        mels: triangular filters on the mel scale.
        coefficients: of the MFCC.
        low, high: hertz, edges of the filters; a ``high`` of 0 is half the sample rate.
        mel_scale: see :class:`MelScale`.
        floor: smallest energy whose logarithm is taken (natural logarithm).
        gain: factor on the samples; 32768 for a model trained on 16-bit numbers.
        input: the model's input; its only one where that is not said.
    """

    sample_rate: int = 16000
    samples: int = 0
    features: Features = Features.WAVEFORM
    frame: int = 400
    hop: int = 160
    fft: int = 0
    mels: int = 40
    coefficients: int = 13
    low: float = 20.0
    high: float = 0.0
    mel_scale: MelScale = MelScale.HTK
    floor: float = 1e-6
    gain: float = 1.0
    input: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """Converts a text to token ids by the ``tokenizers`` library (WordPiece, BPE, Unigram).

    Attributes:
        tokenizer: the user's ``tokenizer.json``; in a bundle, the title of its file.
        max_length: tokens; longer texts are cut.
        buckets: lengths to which texts are filled where the model's length is free, ascending; the last is
            ``max_length``.
        pad: token that fills.
        ids, mask, types: the model's inputs; empty ones are found by their usual names.
    """

    tokenizer: str = "tokenizer.json"
    max_length: int = 128
    buckets: tuple[int, ...] = ()
    pad: int = 0
    ids: str = ""
    mask: str = ""
    types: str = ""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Converts class scores to labels, best first.

    Attributes:
        output: the model's output; its first one where that is not said.
        activation: that the model lacks; by default softmax, where the float model's scores are no probabilities.
        top: labels at most.
        threshold: labels below are left out.
    """

    output: str = ""
    activation: Activation | None = None
    top: int = 5
    threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Converts a detector's outputs to boxes, best first.

    Attributes:
        head: None tells it by the outputs' shapes.
        shares: whether coordinates are shares of the input's size, not pixels; None: their magnitude tells.
        score_floor: boxes below are left out.
        iou_limit: of two boxes of one class that overlap by more, the weaker is left out.
        most: boxes at most.
    """

    head: Head | None = None
    shares: bool | None = None
    score_floor: float = 0.25
    iou_limit: float = 0.7
    most: int = 300


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Converts scores per pixel to a class for each pixel of the picture.

    Attributes:
        output: the model's output; its first one where that is not said.
        threshold: for one channel: from which score on (after a sigmoid, where ``activation`` says so) a pixel is of
            class 1.
        activation: of a single channel; many channels need none.
    """

    output: str = ""
    threshold: float = 0.5
    activation: Activation = Activation.NONE


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Converts scores per step to a text by greedy CTC decoding (Graves et al., 2006).

    Attributes:
        output: the model's output, ``[N, T, C]`` or with ``time_first`` ``[T, N, C]``.
        blank: class that stands for nothing; the others are the bundle's labels, in order.
        space: whether a space follows the labels as a last class.
    """

    output: str = ""
    blank: int = 0
    time_first: bool = False
    space: bool = False


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Converts an output to one vector.

    Attributes:
        output: the model's output; its first one where that is not said.
        pooling: over the tokens of ``[N, T, D]``; by default their mean, none where the output is ``[N, D]``.
        normalize: to length 1.
    """

    output: str = ""
    pooling: Pooling | None = None
    normalize: bool = True


@dataclass(frozen=True, kw_only=True)
class Then:
    """Passes a detector's boxes to another model, one by one.

    Attributes:
        model: name of another model on the same device.
        labels: only boxes of these; all where there are none.
        margin: share of a box's size that is added on each side.
        most: boxes at most, the best.
    """

    model: str
    labels: tuple[str, ...] = ()
    margin: float = 0.0
    most: int = 20


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """From raw data to an answer.

    Attributes:
        normalize: ``(raw * scale - mean) / std`` of the prepared input. In a bundle it stands with the input
            (:attr:`kedge_protocol.bundle.config.TensorSpec.preprocess`) instead.
    """

    task: Task
    picture: Picture | None = None
    sound: Sound | None = None
    text: Text | None = None
    normalize: Preprocess | None = None
    scores: Scores | None = None
    boxes: Boxes | None = None
    mask: Mask | None = None
    sequence: Sequence | None = None
    embedding: Embedding | None = None
    then: Then | None = None

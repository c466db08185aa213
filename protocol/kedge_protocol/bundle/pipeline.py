"""Pipelines as data: how a picture, a sound or a text becomes a model's tensors, and its tensors an answer.

The user writes it as TOML (``kedge compile --pipeline``); it is checked against the model when that is compiled, and
carried in the bundle's configuration. :mod:`kedge_targets.pipeline` runs it, on the host and on the device.

A pipeline has one input section (``picture``, ``sound`` or ``text``) and at most one output section (``scores``,
``boxes``, ``regions``, ``mask``, ``sequence`` or ``embedding``). A length of 0 means the model's own; a bundle contains
none if the model determines it.
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
    FREE = "free"  # proportions kept up to rounding, for a model with free height and width; else like LETTERBOX


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

    Sources: the exports of Ultralytics YOLOv8 and YOLOv5; SSD (Liu et al., 2016, arXiv:1512.02325), with a background
    class first; the ``TFLite_Detection_PostProcess`` operator of TensorFlow.
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
        width, height: the size of the model's input in pixels. Where that is free: the size for calibration and
            evaluation, and for ``line`` the least width.
        fit: how the picture is fitted to that size.
        crop_share: for ``crop``: the fraction of the (scaled) picture's shorter side that is kept; 0.875 scales to 256
            before 224 are cropped.
        filter: the filter used for scaling.
        antialias: whether the filter widens when a picture is scaled down (as in Pillow, but not in OpenCV).
        fill: the background of ``letterbox`` and ``line``, 0..255.
        widest: for ``line`` with a free width: the width to which the input may grow with a longer line.
        shortest, longest: for ``free``: a picture is enlarged until its shorter side has ``shortest`` pixels, but never
            beyond ``longest`` of its longer side; a larger one is scaled down to that.
        multiple: for ``free``: each side is rounded to a multiple of this.
        colour: the colour of the model's input; by default RGB, or grey if it has one channel.
        layout: the layout of the model's input; by default taken from its graph or its shape.
        input: the model's input; by default its only one.
    """

    width: int = 0
    height: int = 0
    fit: Fit = Fit.STRETCH
    crop_share: float = 1.0
    filter: Filter = Filter.BILINEAR
    antialias: bool = True
    fill: int = 114
    widest: int = 0
    shortest: int = 736
    longest: int = 2000
    multiple: int = 32
    colour: Colour | None = None
    layout: str = ""
    input: str = ""


@dataclass(frozen=True, kw_only=True)
class Sound:
    """Converts a sound to samples in -1..1, or to features of frames.

    Attributes:
        sample_rate: the sample rate in hertz; other rates are resampled.
        samples: the number of samples of one call; a longer sound is cut, a shorter one padded with silence. 0 uses
            the length of the model's input, or the sound's own length if the input is free.
        features: see :class:`Features`.
        frame, hop: the samples of one frame, and from one frame to the next.
        fft: the length of the Fourier transform; 0 is the next power of two from ``frame``.
        mels: the number of triangular filters on the mel scale.
        coefficients: the number of MFCC coefficients.
        low, high: the edges of the filters in hertz; a ``high`` of 0 is half the sample rate.
        mel_scale: see :class:`MelScale`.
        floor: the smallest energy whose (natural) logarithm is taken.
        gain: a factor on the samples; 32768 for a model trained on 16-bit numbers.
        input: the model's input; by default its only one.
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
    """Converts a text to token ids with the ``tokenizers`` library (WordPiece, BPE, Unigram).

    Attributes:
        tokenizer: the user's ``tokenizer.json``; in a bundle, the title of its file.
        max_length: the maximum number of tokens; longer texts are cut.
        buckets: the lengths to which texts are padded if the model's length is free, ascending; the last is
            ``max_length``.
        pad: the padding token.
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
        output: the model's output; by default its first one.
        activation: the activation that the model lacks; by default softmax, if the float model's scores are not
            probabilities.
        top: the maximum number of labels.
        threshold: labels with a lower score are left out.
    """

    output: str = ""
    activation: Activation | None = None
    top: int = 5
    threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """Converts a detector's outputs to boxes, best first.

    Attributes:
        head: the format of the boxes; None to recognize it by the outputs' shapes.
        shares: whether coordinates are fractions of the input's size, not pixels; None to decide by their magnitude.
        score_floor: boxes with a lower score are left out.
        iou_limit: if two boxes of one class overlap by more than this, the one with the lower score is left out.
        most: the maximum number of boxes.
    """

    head: Head | None = None
    shares: bool | None = None
    score_floor: float = 0.25
    iou_limit: float = 0.7
    most: int = 300


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Converts a map of probabilities to the regions of text that it shows, in reading order, by the decoding of
    Differentiable Binarization (Liao et al., 2020, arXiv:1911.08947): connected pixels above a threshold, the smallest
    rectangle around them at any angle, grown by what the training had shrunk it.

    Attributes:
        output: the model's output, ``[N, 1, H, W]`` or ``[N, H, W]``; by default its first one.
        threshold: pixels above this probability belong to a region.
        score_floor: regions whose mean probability is lower are left out.
        grow: each side of the rectangle moves outwards by ``grow * area / perimeter``.
        dilate: whether each pixel above the threshold takes its neighbours to the right and below with it.
        least_side: rectangles with a shorter side (in pixels of the map) are left out.
        most: the maximum number of regions; the largest stay.
    """

    output: str = ""
    threshold: float = 0.3
    score_floor: float = 0.5
    grow: float = 1.6
    dilate: bool = True
    least_side: float = 3.0
    most: int = 1000


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Converts scores per pixel to a class for each pixel of the picture.

    Attributes:
        output: the model's output; by default its first one.
        threshold: for a single channel: the lowest score (after a sigmoid, if ``activation`` says so) at which a pixel
            is of class 1.
        activation: for a single channel; several channels need none.
    """

    output: str = ""
    threshold: float = 0.5
    activation: Activation = Activation.NONE


@dataclass(frozen=True, kw_only=True)
class Sequence:
    """Converts scores per step to a text by greedy CTC decoding (Graves et al., 2006).

    Attributes:
        output: the model's output, ``[N, T, C]`` or with ``time_first`` ``[T, N, C]``.
        blank: the blank class; the others are the bundle's labels, in order.
        space: whether a space follows the labels as the last class.
    """

    output: str = ""
    blank: int = 0
    time_first: bool = False
    space: bool = False


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """Converts an output to one vector.

    Attributes:
        output: the model's output; by default its first one.
        pooling: the pooling over the tokens of ``[N, T, D]``; by default their mean, or none if the output is
            ``[N, D]``.
        normalize: whether to normalize the vector to length 1.
    """

    output: str = ""
    pooling: Pooling | None = None
    normalize: bool = True


@dataclass(frozen=True, kw_only=True)
class Then:
    """Cuts boxes or regions out of the picture and passes them to another model, whose pipeline may go on in turn.

    Attributes:
        model: the name of another model on the same device.
        labels: only boxes with these labels are passed; all if empty.
        margin: the fraction of a box's size that is added on each side.
        most: the maximum number of boxes or regions; the first are passed.
        turned_by: the name of a classifier on the same device that sees each cutting first; its labels are the degrees
            by which the cutting is turned (``0``, ``90``, ``180``, ``270``), and it is turned back.
        turned_above: a cutting is turned only if the label's score is above this.
        answer_floor: boxes or regions whose text has a lower score, or is empty, are left out.
        releases: release folders of the named models, beside the pipeline's file: examples of the whole row are then
            measured. Not stored in a bundle.
    """

    model: str
    labels: tuple[str, ...] = ()
    margin: float = 0.0
    most: int = 20
    turned_by: str = ""
    turned_above: float = 0.9
    answer_floor: float = 0.0
    releases: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Passes what this model is not sure of on to a larger model, at a server of the Open Inference Protocol 2 with its
    extension for binary tensors. The larger model takes the same inputs and has the same classes.

    Attributes:
        url: the server, ``http://host:port`` or ``https://host:port``.
        model: the larger model's name there.
        version: its version; by default the server chooses.
        share: the maximum fraction of the items that are passed on (with up to ten more in a burst).
        deadline_ms: the milliseconds within which the larger model has to answer; else this model's answer is given.
        below: items whose best score is lower are passed on; by default chosen on the evaluation data.
        output: the larger model's output; by default its first one.
        activation: the activation that the larger model lacks; by default softmax, if its scores on the evaluation data
            are not probabilities.
        normalized: whether the inputs are sent normalized; by default only to a server that is not Kedge's.
        inputs: the larger model's inputs, in the order of this model's; by default as the server lists them.
    """

    url: str
    model: str
    version: str = ""
    share: float = 0.2
    deadline_ms: int = 500
    below: float | None = None
    output: str = ""
    activation: Activation | None = None
    normalized: bool | None = None
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The conversion from raw data to an answer.

    Attributes:
        normalize: ``(raw * scale - mean) / std`` of the prepared input. In a bundle it is stored with the input
            (:attr:`kedge_protocol.bundle.config.TensorSpec.preprocess`) instead.
    """

    task: Task
    picture: Picture | None = None
    sound: Sound | None = None
    text: Text | None = None
    normalize: Preprocess | None = None
    scores: Scores | None = None
    boxes: Boxes | None = None
    regions: Regions | None = None
    mask: Mask | None = None
    sequence: Sequence | None = None
    embedding: Embedding | None = None
    then: Then | None = None
    cascade: Cascade | None = None

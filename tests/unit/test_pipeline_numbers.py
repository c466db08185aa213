"""What pipelines compute: scaling as Pillow does, placing of pictures, wav files, mel filters, CTC, answers."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import sys
import wave
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge_protocol.bundle.pipeline import (
    Activation,
    Embedding,
    Features,
    Filter,
    Fit,
    Mask,
    MelScale,
    Picture,
    Pooling,
    Scores,
    Sequence,
    Sound,
)
from kedge_protocol.errors import InputError, MissingDependencyError
from kedge_targets.pipeline import audio, bodies, embeddings, examples, masks, pictures, resampling, scores, sequences
from kedge_targets.pipeline.answers import Box, Label, Segments, Vector, to_json
from kedge_targets.pipeline.execution import Runner

Array = npt.NDArray[Any]
Image = pytest.importorskip("PIL.Image")


@settings(max_examples=60, deadline=None)
@given(
    given_size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    wanted=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    by=st.sampled_from([one for one in Filter if one is not Filter.NEAREST]),
    channels=st.sampled_from([1, 3]),
    seed=st.integers(0, 1 << 16),
)
def test_scaling_without_pillow_gives_pillows_bits(
    given_size: tuple[int, int], wanted: tuple[int, int], by: Filter, channels: int, seed: int
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*given_size, channels)).astype(np.uint8)
    with_pillow = resampling.resize(pixels, wanted, by=by)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "PIL", None)
        without = resampling.resize(pixels, wanted, by=by)
    np.testing.assert_array_equal(with_pillow, without)
    if wanted[0] == given_size[1] or wanted[1] == given_size[0]:  # one pass, so that its order is no matter
        picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        expected = np.asarray(picture.resize(wanted, Image.Resampling[by.name])).reshape(with_pillow.shape)
        np.testing.assert_array_equal(without, expected)


@settings(max_examples=40, deadline=None)
@given(
    width=st.integers(3, 300),
    height=st.integers(3, 300),
    fit=st.sampled_from([Fit.STRETCH, Fit.LETTERBOX, Fit.CROP]),
    share=st.floats(0.5, 1.0),
)
def test_boxes_go_into_the_input_and_come_back(width: int, height: int, fit: Fit, share: float) -> None:
    how = Picture(width=48, height=32, fit=fit, crop_share=share, layout="NHWC")
    made, placement = pictures.place(np.zeros((height, width, 3), np.uint8), how)
    assert made.shape == (32, 48, 3)
    inside = np.asarray([[0.4995, 0.4995, 0.5005, 0.5005]])
    there = placement.to_input(inside)
    back = placement.to_picture(there) / [width, height, width, height]
    np.testing.assert_allclose(back, inside, atol=1e-6)


def test_a_letterbox_leaves_the_odd_pixel_right_and_below() -> None:
    made, placement = pictures.place(
        np.full((7, 20, 3), 255, np.uint8), Picture(width=20, height=20, fit=Fit.LETTERBOX, layout="NCHW")
    )
    assert placement.offset == (0.0, 6.0)
    assert (made[:, :6] == 114).all()
    assert (made[:, 6:13] == 255).all()


def test_exif_orientation_and_grey_and_transparency_are_understood() -> None:
    picture = Image.fromarray(np.zeros((10, 20, 3), np.uint8))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(buffer, "JPEG", exif=exif)
    assert pictures.load(buffer.getvalue()).shape == (20, 10, 3)
    assert pictures.load(Image.new("LA", (4, 3))).shape == (3, 4, 1)
    assert pictures.load(Image.new("RGBA", (4, 3))).shape == (3, 4, 3)
    rgb = np.asarray([[[255, 0, 0]]], np.uint8)
    assert pictures.colour(rgb, pictures.Colour.BGR).tolist() == [[[0, 0, 255]]]
    assert pictures.colour(rgb, pictures.Colour.GREY).item() == np.asarray(Image.fromarray(rgb).convert("L")).item()


def test_what_is_no_picture_is_said_to_be_none_and_a_cameras_pair_is_its_first() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "GIF")
    for content in (b"", b"a text", buffer.getvalue()):
        with pytest.raises(InputError, match=r"^a\.jpg: is no picture: neither JPEG, PNG, BMP nor WebP"):
            pictures.load(content, where="a.jpg")
    with pytest.raises(InputError, match=r"^a\.jpg: an array float32 3x4 is no picture"):
        pictures.load(Image.new("F", (4, 3)), where="a.jpg")
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3)).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))])
    assert pictures.load(buffer.getvalue()).shape == (3, 4, 3)


def test_a_bomb_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(buffer, "PNG")
    runner = Runner(_declared(picture=Picture(width=8, height=8, layout="NCHW")), [_Spec("x", (1, 3, 8, 8))], (), str)
    with pytest.raises(InputError, match=r"9000x9000 pixels is over the limit"):
        bodies.answer(runner, lambda feeds: {}, buffer.getvalue(), "image/png")
    with pytest.raises(InputError, match=r"image/jpeg, image/png"):
        bodies.answer(runner, lambda feeds: {}, b"", "text/plain")
    # What a client does not name is taken for what the model takes; what it names wrongly is not.
    for unnamed in ("", "application/octet-stream", "application/x-www-form-urlencoded", "image/jpg", "image/webp"):
        with pytest.raises(InputError, match=r"9000x9000 pixels is over the limit"):
            bodies.answer(runner, lambda feeds: {}, buffer.getvalue(), unnamed)
    with pytest.raises(InputError, match=r"content-type"):
        bodies.answer(runner, lambda feeds: {}, buffer.getvalue(), "multipart/form-data")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"Pillow.*kedge-agent\[pictures\]"):
        bodies.answer(runner, lambda feeds: {}, buffer.getvalue(), "image/png")


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_wav_files_of_all_widths_tell_the_same_samples(width: int, tmp_path: Path) -> None:
    values = np.asarray([0.0, 0.5, -0.5, -1.0, 0.25])
    whole = np.rint(values * 2 ** (8 * width - 1)).astype(np.int64)
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(width)
        file.setframerate(16000)
        shifted = whole + 128 if width == 1 else whole
        for value in shifted:
            file.writeframes(int(value).to_bytes(width, "little", signed=width != 1) * 2)
    np.testing.assert_allclose(audio.load(path, Sound()), values, atol=1e-6)


def wav_of(form: bytes, samples: bytes, *, length: int | None = None, before: bytes = b"") -> bytes:
    size = len(samples) if length is None else length
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + before + b"data" + struct.pack("<I", size) + samples
    return b"RIFF" + struct.pack("<I", (4 + len(chunks)) & 0xFFFFFFFF) + b"WAVE" + chunks


PCM = struct.pack("<HHIIHH", 1, 1, 16000, 32000, 2, 16)
SAMPLES = np.asarray([0, 8192, -16384, 32767], "<i2").tobytes()
HEARD = [0.0, 0.25, -0.5, 32767 / 32768]


@pytest.mark.parametrize(
    "content",
    [
        wav_of(PCM, SAMPLES),
        # What a recorder writes into a pipe: it does not know how long it will be.
        wav_of(PCM, SAMPLES, length=0xFFFFFFFF),
        wav_of(PCM, SAMPLES, length=0x7FFFFFFF),
        wav_of(PCM, SAMPLES, length=0x80000000),
        # A note of odd length before the samples, and half a sample behind them.
        wav_of(PCM, SAMPLES + b"x", before=b"LIST" + struct.pack("<I", 3) + b"abc\0"),
        wav_of(struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32), np.asarray(HEARD, "<f4").tobytes()),
        wav_of(struct.pack("<HHIIHH", 3, 1, 16000, 128000, 8, 64), np.asarray(HEARD, "<f8").tobytes()),
        # Extensible, as ffmpeg and Windows write more than 16 bits or two channels.
        wav_of(
            struct.pack("<HHIIHHHHIH", 0xFFFE, 1, 16000, 32000, 2, 16, 22, 16, 4, 1) + bytes(14), SAMPLES
        ),
    ],
)  # fmt: skip
def test_wav_files_as_recorders_and_tools_write_them(content: bytes) -> None:
    np.testing.assert_allclose(audio.load(content, Sound()), HEARD, atol=1e-7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "begin"),
        (b"RIFF\0\0\0\0WAVE", "no samples"),
        (wav_of(PCM, SAMPLES)[:-2], "cut short, 6 bytes of 8"),
        (wav_of(PCM, SAMPLES)[:30], "format is cut short"),
        (wav_of(struct.pack("<HHIIHH", 7, 1, 8000, 8000, 1, 8), SAMPLES), "format 7"),
        (wav_of(struct.pack("<HHIIHH", 1, 0, 8000, 8000, 1, 8), SAMPLES), "contradicts"),
        (wav_of(struct.pack("<HHIIHH", 1, 1, 0, 8000, 1, 8), SAMPLES), "contradicts"),
        (wav_of(struct.pack("<HHIIHH", 3, 1, 8000, 32000, 4, 32), np.float32([np.nan]).tobytes()), "NaN"),
    ],
)
def test_a_sound_that_cannot_be_read_is_told_why(content: bytes, words: str) -> None:
    with pytest.raises(InputError, match=rf"no wav file that can be read: .*{words}"):
        audio.load(content, Sound())


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=60).map(lambda rest: b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0" + rest))
def test_any_bytes_are_a_sound_or_refused(content: bytes) -> None:
    with contextlib.suppress(InputError):
        assert np.isfinite(audio.load(content, Sound())).all()


def test_resampling_keeps_a_tone() -> None:
    times = np.arange(44100) / 44100
    made = audio.resampled(np.sin(2 * np.pi * 440 * times).astype(np.float32), 44100, 16000)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(made) == 16000
    np.testing.assert_allclose(made[200:-200], expected[200:-200], atol=0.01)


def test_log_mel_and_mfcc_are_what_torch_and_the_formulas_give() -> None:
    torch = pytest.importorskip("torch")
    samples = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    how = Sound(frame=512, hop=160, fft=512, mels=20, low=60.0, high=7600.0, features=Features.MFCC)
    spectrum = torch.stft(
        torch.from_numpy(samples).double(), 512, 160, window=torch.hann_window(512).double(), center=False,
        return_complex=True,
    ).abs().square().numpy()  # fmt: skip
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + np.asarray([60, 7600]) / 700)), 22) / 2595) - 1)
    bins = np.linspace(0, 8000, 257)
    bank = np.stack([np.interp(bins, edges[i : i + 3], [0, 1, 0], left=0, right=0) for i in range(20)])
    mels = audio.log_mel(samples, how)
    np.testing.assert_allclose(mels, np.log(np.maximum(bank @ spectrum, 1e-6)).T, rtol=1e-4, atol=1e-4)
    index = np.arange(20)
    basis = np.asarray(
        [np.cos(np.pi * k * (2 * index + 1) / 40) * np.sqrt((1 if k == 0 else 2) / 20) for k in range(13)]
    )
    np.testing.assert_allclose(audio.features(samples, how), mels @ basis.T, rtol=1e-3, atol=1e-3)
    slaney = audio.filters(512, 16000, 20, 60.0, 7600.0, MelScale.SLANEY)
    areas = slaney.sum(axis=0) * 16000 / 512
    assert areas[8:] == pytest.approx(1.0, abs=0.05)


def test_ctc_joins_repetitions_and_drops_blanks() -> None:
    steps = [0, 1, 1, 0, 1, 2, 2, 3, 0]
    made = np.full((len(steps), 4), 0.02, np.float32)
    made[np.arange(len(steps)), steps] = 0.94
    found = sequences.decode(made, Sequence(), "abc")
    assert found.text == "aabc"
    assert found.score == pytest.approx(0.94, abs=0.01)
    assert sequences.decode(made, Sequence(blank=3), "xyz").text == "xyxyzx"
    with pytest.raises(InputError, match="alphabet"):
        sequences.decode(made, Sequence(), "a")


def test_scores_become_labels_best_first_and_nan_is_none() -> None:
    how = Scores(activation=Activation.SOFTMAX, top=2)
    found = scores.best(np.asarray([1.0, 3.0, 2.0]), how, ("a", "b"))
    assert [one.name for one in found] == ["b", "2"]
    assert found[0].score == pytest.approx(np.exp(3) / np.exp([1, 3, 2]).sum())
    assert scores.best(np.asarray([np.nan, 0.1]), Scores(activation=Activation.NONE), ()) == [Label("1", 1, 0.1)]
    assert scores.sigmoid(np.asarray([-1000.0, 1000.0])).tolist() == [0.0, 1.0]


def test_pooling_leaves_padding_out() -> None:
    output = np.asarray([[3.0, 0.0], [1.0, 0.0], [0.0, 100.0]])
    found = embeddings.vector(output, Embedding(pooling=Pooling.MEAN, normalize=False), np.asarray([1, 1, 0]))
    assert found.values.tolist() == [2.0, 0.0]
    assert found.similarity(Vector(np.asarray([0.0, 1.0], np.float32))) == 0.0


def test_answers_are_plain_data() -> None:
    given_ = [Box("cat", 0, 0.1, 1.0, 2.0, 3.0, 4.0, then=[Label("tabby", 3, 0.5)])]
    assert json.loads(json.dumps(to_json(given_)))[0]["then"] == [{"name": "tabby", "index": 3, "score": 0.5}]
    segments = Segments(np.asarray([[0, 0, 1], [1, 1, 0]], np.uint8), ("a", "b"))
    assert to_json(segments) == {"size": [2, 3], "runs": [[0, 2], [1, 3], [0, 1]], "labels": ["a", "b"]}


def test_examples_tell_a_wrong_answer_from_a_slightly_other_one() -> None:
    right = [{"index": 1, "score": 0.9}, {"index": 0, "score": 0.1}]
    near = [{"index": 1, "score": 0.88}, {"index": 2, "score": 0.12}]
    other = [{"index": 0, "score": 0.9}, {"index": 1, "score": 0.1}]
    assert examples.deviations(right, near, 0.05)["score"] == pytest.approx(0.02)
    assert examples.deviations(right, other, 0.05)["score"] == pytest.approx(0.8)
    assert examples.deviations(right, [], 0.05)["score"] == float("inf")
    box = {"index": 0, "score": 0.9, "x1": 0.0, "y1": 0.0, "x2": 10.0, "y2": 10.0}
    assert examples.deviations([box], [{**box, "x1": 30.0, "x2": 40.0}], 0.05, floor=0.25)["corner"] == float("inf")
    assert examples.deviations([box], [{**box, "x2": 11.0}], 0.05, floor=0.25)["corner"] == 1.0


class _Spec:
    def __init__(self, name: str, shape: tuple[int | None, ...]) -> None:
        self.name, self.shape = name, shape


def _declared(**sections: Any) -> Any:
    from kedge_protocol.bundle.pipeline import Pipeline, Task

    return Pipeline(task=Task.CLASSIFICATION, scores=Scores(), **sections)


def test_masks_come_back_to_the_pictures_pixels() -> None:
    how = Picture(width=8, height=8, fit=Fit.LETTERBOX, layout="NCHW")
    _, placement = pictures.place(np.zeros((20, 40, 3), np.uint8), how)
    output = np.zeros((2, 8, 8), np.float32)
    output[1, :, 4:] = 1.0  # the right half, bars above and below too
    found = masks.segments(output, Mask(), ("ground", "thing"), placement)
    assert found.classes.shape == (20, 40)
    assert (found.classes[:, :20] == 0).all()
    assert (found.classes[:, 20:] == 1).all()
    single = masks.segments(output[1:] * 8 - 4, Mask(activation=Activation.SIGMOID), (), placement)
    np.testing.assert_array_equal(single.classes, found.classes)


def test_a_line_of_text_is_scaled_to_the_height_and_filled_on_the_right() -> None:
    line = np.full((10, 30, 3), 200, np.uint8)
    made, _ = pictures.place(line, Picture(width=40, height=10, fit=Fit.LINE, fill=7, layout="NHWC"))
    assert (made[:, :30] == 200).all()
    assert (made[:, 30:] == 7).all()
    wide, _ = pictures.place(np.tile(line, (1, 4, 1)), Picture(width=40, height=10, fit=Fit.LINE, layout="NHWC"))
    assert (wide == 200).all()

"""``--preprocess`` as text."""

from __future__ import annotations

import pytest

from kedge.evaluation.preprocessing import parse
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import ConfigError
from kedge_targets.graph.signature import TensorInfo

IMAGE = TensorInfo(name="image:0", shape=(None, 3, 8, 8), dtype="float32", layout="NCHW")
OTHER = TensorInfo(name="other", shape=(None, 5), dtype="float32")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("scale=1/255", Preprocess(scale=(1 / 255,))),
        ("scale=1/255,mean=0.5,std=0.25", Preprocess(scale=(1 / 255,), mean=(0.5,), std=(0.25,))),
        ("mean=0.485:0.456:0.406", Preprocess(mean=(0.485, 0.456, 0.406))),
        (" std=2 , mean=-1e-3 ", Preprocess(mean=(-0.001,), std=(2.0,))),
        ("image:0:mean=1:2:3", Preprocess(mean=(1.0, 2.0, 3.0))),
    ],
)
def test_steps_are_read(text: str, wanted: Preprocess) -> None:
    assert parse([text], [IMAGE]) == {"image:0": wanted}


def test_each_of_several_inputs_has_its_own() -> None:
    found = parse(["other:scale=2", "image:0:scale=1/255"], [IMAGE, OTHER])
    assert found == {"other": Preprocess(scale=(2.0,)), "image:0": Preprocess(scale=(1 / 255,))}


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["nonsense"], "'nonsense' cannot be read"),
        (["scale=x"], "'x' in 'scale=x' is no number"),
        (["scale=1/0"], "is no number"),
        (["scale=nan"], "is not finite"),
        (["std=0"], "a std of 0"),
        (["mean=1:2"], "mean has 2 values, input 'image:0' has 3 channels"),
        (["scale=1,scale=2"], "'scale=2'"),
        (["scale=1,size=2"], "'size=2'"),
        (["missing:scale=1"], "'missing' is no input"),
        (["scale=1", "scale=2"], "named twice"),
    ],
)
def test_what_cannot_be_meant_is_refused(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(texts, [IMAGE])


def test_with_several_inputs_one_must_be_named() -> None:
    with pytest.raises(ConfigError, match="names none of the model's 2 inputs"):
        parse(["scale=1"], [IMAGE, OTHER])

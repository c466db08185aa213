"""Texts where a model's file, or a target, has one length: both data sets get it, and what is longer is cut as the
tokenizer cuts it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge.importing.data_folders import converting
from kedge.importing.data_folders.converting import Beside, ConvertRequest
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import declaration, settling
from kedge_targets.pipeline.execution import Runner

SCORES = (TensorInfo(name="scores", shape=(None, 2), dtype="float32"),)
END = 2


def inputs(length: int | None) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(name=name, shape=(None, length), dtype="int64") for name in ("input_ids", "attention_mask"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """Words, and ``[SEP]`` (:data:`END`) behind each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "[SEP]": END, "word": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", END)])
    made.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path / "tokenizer.json")


def pipeline(tokenizer: str, length: int | None) -> Pipeline:
    declared = declaration.declared({"task": "text-classification", "text": {"tokenizer": tokenizer}}, where="p")
    return settling.settled(declared, inputs(length), SCORES, where="p")


def test_both_data_sets_get_the_length_of_the_longest_text(tokenizer: str, tmp_path: Path) -> None:
    texts = {"calibration": "word\n" * 3, "evaluation": "word\n" + "word " * 50}
    for role, content in texts.items():
        (tmp_path / f"{role}.txt").write_text(content, encoding="utf-8")
    widths = set()
    for role, other in (("calibration", "evaluation"), ("evaluation", "calibration")):
        (tmp_path / role).mkdir()
        request = ConvertRequest(
            path=str(tmp_path / f"{role}.txt"), role=role, pipeline=pipeline(tokenizer, None), inputs=inputs(None),
            folder=str(tmp_path / role), beside=Beside(path=str(tmp_path / f"{other}.txt"), role=other),
        )  # fmt: skip
        made = converting.convert(request, lambda *_: None)
        widths.add(np.load(made.arrays["input_ids"]).shape[1])
    assert widths == {64}


def test_a_text_that_is_too_long_for_the_file_keeps_the_token_that_ends_it(tokenizer: str) -> None:
    """The pipeline, settled by the model, allows more than the file of a target with fixed sizes."""
    runner = Runner(pipeline(tokenizer, None), inputs(8), (), converting.read_text)
    feeds = runner.tokens([runner.tokenizer()("word " * 50)])
    assert feeds["input_ids"].tolist() == [[3] * 7 + [END]]
    assert runner.tokens([runner.tokenizer()("word")])["input_ids"].tolist() == [[3, END] + [0] * 6]

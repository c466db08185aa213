"""Texts for language models as people have them: other encodings, line ends and separators, and lines that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet
from tests.support import decoders, raw_data

from kedge.evaluation.decoders import choices, pairs, texts
from kedge_protocol.bundle.generation import Source, Speech
from kedge_protocol.errors import DatasetError

_SEPARATORS = "one\u2028two\x85three\x0cfour"
_SOURCE = Source(positions=64, position_bytes=0, begin_tokens=(1,), end_token=2)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    decoders.tokenizer(tmp_path)
    return texts.tokenizer((tmp_path / "tokenizer.json").read_bytes(), where="tokenizer.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_encodings_and_line_ends_change_no_text(tmp_path: Path, encoding: str, ending: str) -> None:
    lines = ["First line", "", "zweite Zeile äöü"]
    (tmp_path / "a.TXT").write_bytes(ending.join(lines).encode(encoding))
    records = [json.dumps({"text": line}, ensure_ascii=False) for line in lines if line]
    (tmp_path / "b.jsonl").write_bytes(ending.join([*records, ""]).encode(encoding))
    found, _ = texts.read(tmp_path)
    assert found == ["\n".join(lines), "First line", "zweite Zeile äöü"]


def test_a_line_of_json_may_hold_the_separators_of_unicode(tmp_path: Path, tokenizer: Any) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text(json.dumps({"text": _SEPARATORS}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(texts.of_file(one)) == [_SEPARATORS]
    asked = {"question": _SEPARATORS, "choices": ["a", "b"], "answer": 1}
    one.write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")
    assert len(choices.read(one, tokenizer, begin=None, longest=64)) == 1
    one.write_text(json.dumps({"source": _SEPARATORS, "target": "x"}, ensure_ascii=False), encoding="utf-8")
    found, _ = pairs.of_texts(one, tokenizer, _SOURCE, wanted=4)
    assert len(found) == 1


@pytest.mark.parametrize("line", ["5", "null", '["text"]', '{"text": 5}', '{"prompt": "x"}', "{", '"\\ud83d"'])
def test_a_line_that_holds_no_text_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DatasetError, match=r"a\.jsonl:3: (holds|is no JSON)"):
        texts.read(tmp_path)
    assert list(texts.of_file(_written(tmp_path / "b.jsonl", '"\\ud83d\\ude00"'))) == ["\N{GRINNING FACE}"]


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_what_is_not_there_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="there is no such file or folder"):
        texts.read(tmp_path / "nosuch")
    with pytest.raises(DatasetError, match="holds no text"):
        texts.read(_written(tmp_path / "a.csv", "text\nx\n"))


def test_the_name_of_a_folder_of_sounds_may_have_a_dot(tmp_path: Path, tokenizer: Any) -> None:
    folder = tmp_path / "speech.v1"
    folder.mkdir()
    raw_data.write_wav(folder / "A.WAV", np.zeros(16000))
    (folder / "A.txt").write_bytes("hello\r\n".encode("utf-16"))
    speech = Speech(rate=16000, frame=400, hop=160, mels=80, languages={})
    source = Source(positions=1500, position_bytes=0, begin_tokens=(1,), end_token=None, speech=speech)
    found, _ = pairs.of_sounds(folder, tokenizer, source, (2,), wanted=4)
    assert [one.answer[-1] for one in found] == [2]
    with pytest.raises(DatasetError, match="holds no sound"):
        pairs.of_sounds(_written(tmp_path / "a.mp3", "x"), tokenizer, source, (2,), wanted=4)


def test_rows_of_parquet_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "content": ["one", None, "three"]}), path)
    assert list(texts.of_file(path)) == ["one", "three"]
    parquet.write_table(pyarrow.table({"id": [1], "sentence": ["one"]}), path)
    with pytest.raises(DatasetError, match="has no column 'text', it has id, sentence"):
        list(texts.of_file(path))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DatasetError, match="cannot be read"):
        list(texts.of_file(path))

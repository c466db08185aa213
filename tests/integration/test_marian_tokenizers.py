"""The tokenizer made of a Marian folder's ``source.spm`` and ``vocab.json`` is SentencePiece with Marian's numbers."""

from __future__ import annotations

import importlib
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from tests.support import encoder_decoders, foreign
from tokenizers import Tokenizer

from kedge.importing.decoders import marian_text, reading
from kedge_protocol.errors import ModelError

ROOT = Path(__file__).parents[2]
_PIECES = {"<unk>": 0.0, "\u2581": -4.0, "\u2581the": -2.0, "\u2581cat": -3.0, "s": -3.5, "th": -9.0, "e": -5.0}


def _field(number: int, content: bytes) -> bytes:
    size, head = len(content), bytes([number << 3 | 2])
    return head + (bytes([size]) if size < 128 else bytes([size & 127 | 128, size >> 7])) + content


def spm(pieces: dict[str, float], *, kind: int = 1) -> bytes:
    """A SentencePiece file of these pieces."""
    made = [_field(1, _field(1, name.encode()) + b"\x15" + struct.pack("<f", at)) for name, at in pieces.items()]
    return b"".join((*made, _field(2, bytes([3 << 3, kind]))))


def folder(path: Path, **options: Any) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "source.spm").write_bytes(spm(_PIECES, **options))
    names = ["</s>", "<unk>", *(name for name in _PIECES if name != "<unk>"), "\u2581Katze", ">>deu<<", "<pad>"]
    (path / "vocab.json").write_text(json.dumps({name: at for at, name in enumerate(names)}))
    return path


def test_a_text_is_cut_by_the_source_and_numbered_by_the_vocabulary(tmp_path: Path) -> None:
    raw = marian_text.tokenizer(folder(tmp_path))
    assert raw is not None
    made = Tokenizer.from_str(raw.decode())
    found = made.encode(">>deu<< the  cats", add_special_tokens=False)
    assert found.tokens[1:] == ["\u2581the", "\u2581cat", "s"]
    assert found.ids == [9, 3, 4, 5]
    assert made.encode("q", add_special_tokens=False).ids == [2, 1]
    assert made.decode([8, 4, 5, 0], skip_special_tokens=True) == "Katze cats"


def test_a_marian_folder_is_read_without_a_tokenizer_json(tmp_path: Path) -> None:
    path = encoder_decoders.folder(tmp_path, "marian")
    (path / "tokenizer.json").unlink()
    text = reading.read(folder(path)).text
    assert text.source is not None
    assert Tokenizer.from_str(text.tokenizer.decode()).token_to_id(">>deu<<") == 9


@pytest.mark.parametrize(
    ("title", "content", "text"),
    [
        ("source.spm", spm(_PIECES)[:-30], "is no SentencePiece file"),
        ("source.spm", spm(_PIECES, kind=2), "is no unigram model"),
        ("source.spm", b"", "holds no pieces"),
        ("vocab.json", b'{"a": 0}', "is no vocabulary with <unk>"),
        ("target_vocab.json", b"{}", "a vocabulary of its own"),
    ],
)
def test_files_that_are_not_whole_are_errors(title: str, content: bytes, text: str, tmp_path: Path) -> None:
    (folder(tmp_path) / title).write_bytes(content)
    with pytest.raises(ModelError, match=text):
        marian_text.tokenizer(tmp_path)


@pytest.mark.campaign
def test_lines_of_text_are_cut_as_sentencepiece_does(tmp_path: Path) -> None:
    foreign.importable("sentencepiece")
    library: Any = importlib.import_module("sentencepiece")
    text = "".join((ROOT / "docs" / name).read_text() for name in ("architecture.md", "compression.md"))
    (tmp_path / "text.txt").write_text(text)
    trainer = library.SentencePieceTrainer
    prefix = str(tmp_path / "source")
    trainer.train(input=str(tmp_path / "text.txt"), model_prefix=prefix, vocab_size=600, minloglevel=2)
    (tmp_path / "source.model").rename(tmp_path / "source.spm")
    own = library.SentencePieceProcessor(model_file=str(tmp_path / "source.spm"))
    pieces = [own.id_to_piece(at) for at in range(own.get_piece_size())]
    names = ["</s>", "<unk>", *(one for one in pieces if one not in ("<s>", "</s>", "<unk>")), "<pad>"]
    numbers = {name: at for at, name in enumerate(names)}
    (tmp_path / "vocab.json").write_text(json.dumps(numbers))
    raw = marian_text.tokenizer(tmp_path)
    assert raw is not None
    made = Tokenizer.from_str(raw.decode())
    lines = [
        *(line for line in text.splitlines() if line.strip()),
        "Gr\u00f6\u00dfe  und   Stra\u00dfe",
        "\ufb01ne \u00bd",
    ]
    for line in lines:
        wanted = [numbers.get(piece, 1) for piece in own.encode(line, out_type=str)]
        assert made.encode(line, add_special_tokens=False).ids == wanted, line

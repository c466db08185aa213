"""Streamed text: characters are never cut, stop strings never leak, and all pieces together are the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_agent.generation.pieces import TextPieces, TokenBytes

tokenizers = pytest.importorskip("tokenizers")


def _bytes_tokenizer() -> Any:
    """A token for each byte, as byte-level BPE has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: at for at, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


TOKENIZER = _bytes_tokenizer()


def _pieces(text: str, stop: list[str]) -> tuple[list[str], TextPieces]:
    pieces = TextPieces(TOKENIZER, stop)
    shown = [pieces.add(token) for token in TOKENIZER.encode(text).ids]
    return [*shown, pieces.end()], pieces


@given(st.text(alphabet="ab🐢é거\u200d👩👧", max_size=20))
def test_all_pieces_are_the_text_and_none_holds_half_a_character(text: str) -> None:
    shown, pieces = _pieces(text, [])
    assert "".join(shown) == text
    assert not pieces.stopped
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


@given(st.text(alphabet="abc🐢", max_size=16), st.lists(st.text(alphabet="abc🐢", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    shown, pieces = _pieces(text, stop)
    # The first moment at which a stop string is whole decides, and there the one that begins first.
    ends = [text.find(one) + len(one) for one in stop if one in text]
    if not ends:
        assert "".join(shown) == text
        return
    whole = text[: min(ends)]
    assert pieces.stopped
    assert "".join(shown) == whole[: min(whole.find(one) for one in stop if one in whole)]


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    pieces = TextPieces(TOKENIZER, ["END.", "ENOUGH"])
    shown = [pieces.add(token) for token in TOKENIZER.encode("an EN ENO END.x").ids]
    assert "".join(shown) == "an EN ENO "
    assert "E" not in shown


def _words_tokenizer() -> Any:
    """Words with the mark of their beginning, and bytes, as SentencePiece's converters have it (Llama)."""
    from tokenizers import Tokenizer, decoders, models

    words = ["<s>", "\u2581once", "\u2581upon", "on", "<0xF0>", "<0x9F>", "<0x90>", "<0xA2>"]
    made = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[], byte_fallback=True))
    made.add_special_tokens(["<s>"])
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    return made


@pytest.mark.parametrize(("after", "text"), [(None, "upon"), (0, "upon"), (1, " upon"), (3, " upon")])
def test_an_answer_begins_with_the_space_of_its_first_word_where_it_goes_on_with_a_text(
    after: int | None, text: str
) -> None:
    pieces = TextPieces(_words_tokenizer(), after=after)
    assert pieces.add(2) + pieces.add(3) + pieces.end() == f"{text}on"


@given(st.text(alphabet="ab🐢é거", min_size=1, max_size=4), st.text(alphabet="ab🐢é", max_size=4))
def test_nothing_of_the_text_before_is_shown_whatever_token_it_ends_with(before: str, text: str) -> None:
    pieces = TextPieces(TOKENIZER, after=TOKENIZER.encode(before).ids[-1])
    assert "".join(map(pieces.add, TOKENIZER.encode(text).ids)) + pieces.end() == text


def test_what_tokens_stand_for_together_is_the_text() -> None:
    words = TokenBytes(_words_tokenizer())
    assert b"".join(map(words, [1, 2, 3, 4, 5, 6, 7])) == " once uponon🐢".encode()
    assert (words(5), words(99)) == (b"\x9f", b"")
    letters = TokenBytes(TOKENIZER)
    text = "a \n~é🐢\x00"
    assert b"".join(map(letters, TOKENIZER.encode(text).ids)) == text.encode()
    assert len(letters(0)) == 1

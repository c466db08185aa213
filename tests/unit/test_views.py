"""Typed views: what was written is read again, strictly; bad fields are named, all of them."""

from __future__ import annotations

import dataclasses
import enum
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_protocol import codec
from kedge_protocol.errors import ConfigError, MessageError

pytestmark = pytest.mark.device


class Colour(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    number: int
    share: float
    flag: bool
    media_type: str = codec.named("mediaType")
    colour: Colour = Colour.RED
    note: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    leaves: tuple[Leaf, ...]
    by_name: dict[str, Leaf]
    shape: tuple[int | None, ...] = ()
    anything: Any = None


text = st.text(max_size=8)
leaves = st.builds(
    Leaf,
    number=st.integers(-(2**60), 2**60),
    share=st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    media_type=text,
    colour=st.sampled_from(Colour),
    note=st.none() | text,
)
trees = st.builds(
    Tree,
    leaves=st.lists(leaves, max_size=3).map(tuple),
    by_name=st.dictionaries(text, leaves, max_size=3),
    shape=st.lists(st.none() | st.integers(0, 9), max_size=4).map(tuple),
    anything=st.none() | st.dictionaries(text, st.integers(), max_size=2),
)


@given(trees)
def test_what_was_written_is_read_again(tree: Tree) -> None:
    raw = codec.encode(tree)
    assert codec.decode(raw, Tree, where="test") == tree
    assert codec.encode(codec.decode(raw, Tree, where="test")) == raw


GOOD: dict[str, Any] = {"number": 1, "share": 2, "flag": True, "mediaType": "x"}


def test_names_in_json_are_the_fields_own() -> None:
    leaf = codec.structure(GOOD, Leaf, where="test")
    assert leaf == Leaf(number=1, share=2.0, flag=True, media_type="x")
    assert isinstance(leaf.share, float)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"number": "1"}, "Leaf.number"),
        ({"number": True}, "Leaf.number"),
        ({"number": 1.5}, "Leaf.number"),
        ({"share": "2"}, "Leaf.share"),
        ({"share": None}, "Leaf.share"),
        ({"flag": 1}, "Leaf.flag"),
        ({"mediaType": 5}, "Leaf.mediaType"),
        ({"colour": "green"}, "Leaf.colour"),
        ({"note": 3}, "Leaf.note"),
    ],
)
def test_nothing_is_coerced_and_the_field_is_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MessageError, match=named.replace(".", r"\.")):
        codec.structure({**GOOD, **changes}, Leaf, where="test")


def test_every_bad_field_is_named_at_once() -> None:
    data = {"leaves": [{**GOOD, "number": "x"}, {}], "by_name": {"a": {**GOOD, "flag": 0}}}
    with pytest.raises(MessageError) as caught:
        codec.structure(data, Tree, where="test")
    for named in ("leaves[0].number", "leaves[1].number", "leaves[1].mediaType", "by_name['a'].flag"):
        assert named in str(caught.value)


def test_unknown_keys_are_kept_out_of_a_view_and_forbidden_where_people_write() -> None:
    data = {**GOOD, "later": 1}
    assert codec.structure(data, Leaf, where="test") == codec.structure(GOOD, Leaf, where="test")
    with pytest.raises(ConfigError, match="later"):
        codec.structure(data, Leaf, where="test", strict=True)
    nested = {"leaves": [data], "by_name": {}}
    with pytest.raises(ConfigError, match=r"leaves\[0\]\.later"):
        codec.structure(nested, Tree, where="test", strict=True)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | text, lambda inner: st.lists(inner) | st.dictionaries(text, inner)
    )
)
def test_any_other_data_is_one_clear_error(data: Any) -> None:
    with pytest.raises(MessageError, match="Tree"):
        codec.structure({"leaves": data, "by_name": 1}, Tree, where="test")


@pytest.mark.parametrize("raw", [b'"\\ud800"', b'{"a": "\\uDFFF"}', b'["\xed\xa0\x80"]', b'{"\\udc00": 1}', b"\xff"])
def test_text_that_utf_8_cannot_say_is_refused_where_it_comes_in(raw: bytes) -> None:
    with pytest.raises(MessageError):
        codec.loads(raw, where="here")


@given(text=st.text())
def test_all_other_text_goes_in_and_out(text: str) -> None:
    assert codec.loads(codec.encode([text]), where="here") == [text]
    assert codec.loads(json.dumps([text]).encode(), where="here") == [text]


@pytest.mark.parametrize("share", [10**400, -(10**400), float("nan"), float("inf"), float("-inf")])
def test_a_number_that_no_finite_float_is_is_refused_in_a_users_file_and_named(share: float) -> None:
    with pytest.raises(ConfigError, match=r"test: share: "):
        codec.structure({**GOOD, "share": share}, Leaf, where="test", strict=True)


@pytest.mark.parametrize("share", [10**400, -(10**400)])
@pytest.mark.parametrize("strict", [False, True])
def test_a_number_beyond_every_float_is_refused_and_named(share: int, strict: bool) -> None:
    with pytest.raises(ConfigError if strict else MessageError, match="test: share: " if strict else r"Leaf\.share"):
        codec.structure({**GOOD, "share": share}, Leaf, where="test", strict=strict)


def test_an_integer_of_more_digits_than_python_writes_is_named_all_the_same() -> None:
    with pytest.raises(MessageError, match=r"Leaf\.mediaType: str was expected, not the int"):
        codec.structure({**GOOD, "mediaType": 1 << 20_000}, Leaf, where="test")


@pytest.mark.parametrize(
    "raw",
    [b"NaN", b"[Infinity]", b'{"a": -Infinity}', b"1e999", b"-1e999", '"UTF-16"'.encode("utf-16")],
)
def test_what_could_not_be_written_is_not_read(raw: bytes) -> None:
    with pytest.raises(MessageError, match="not JSON"):
        codec.loads(raw, where="test")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
        max_leaves=8,
    )
)
def test_what_is_read_can_be_written(data: Any) -> None:
    for raw in (json.dumps(data).encode(), codec.encode(data)):
        assert codec.loads(codec.encode(codec.loads(raw, where="test")), where="test") == data

"""What devices send, in any order and of any content, ends in the newest truth or in nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.fleet.inbox import DeviceState, Inbox, SeldomLog, check_text
from kedge_protocol import codec
from kedge_protocol.errors import MessageError
from kedge_protocol.messages import Reported, Status

KINDS = ("status", "reported", "tele/metrics", "ack/1", "desired", "")


def inbox() -> Inbox:
    made = Inbox()
    made.know({"pi": DeviceState()})
    return made


def report(boot: str, seq: int) -> bytes:
    return codec.encode(
        Reported(
            boot_id=boot,
            seq=seq,
            target="rpi4",
            agent_version="0",
            architecture="x",
            python="3",
            runtimes={},
            free_bytes=0,
            desired_version=seq,
        )
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = ("online", "boot_id", "session", "seq", "at", "models", "target", "desired_version", "cid", "ok")
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, json_values))
payloads = st.binary(max_size=40) | fields.map(lambda value: json.dumps(value).encode())


@given(messages=st.lists(st.tuples(st.sampled_from(KINDS), payloads, st.booleans()), max_size=8))
def test_nothing_that_a_device_sends_gets_further_than_the_inbox(messages: list[tuple[str, bytes, bool]]) -> None:
    made = inbox()
    for kind, payload, retained in messages:
        made.put(f"kedge/v1/d/pi/{kind}", payload, retained)
        made.put(f"kedge/v1/d/{kind}", payload, retained)
    made.put("kedge/v1/d/pi/reported", report("sound", 7), False)
    change = made.digest()["pi"]
    assert change.reported == report("sound", 7)
    assert change.memory.presence.online


@given(
    numbers=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    later=st.lists(st.integers(1, 9), max_size=6),
    retained=st.booleans(),
)
def test_the_newest_report_of_the_present_boot_stands(numbers: list[int], later: list[int], retained: bool) -> None:
    made = inbox()
    for seq in numbers:
        made.put("kedge/v1/d/pi/reported", report("one", seq), False)
    newest = ("one", max(numbers))
    if later:
        made.put("kedge/v1/d/pi/status", codec.encode(Status(online=True, boot_id="two", session=1)), False)
        for seq in later:
            made.put("kedge/v1/d/pi/reported", report("two", seq), False)
        newest = ("two", max(later))
        if retained:
            # From a broker's old store, after the device spoke with its present boot.
            made.put("kedge/v1/d/pi/reported", report("one", 99), True)
    change = made.digest()["pi"]
    assert change.memory.report == newest
    assert change.reported == report(*newest)


def test_what_was_not_written_is_kept_for_the_next_round() -> None:
    made = inbox()
    made.put("kedge/v1/d/pi/reported", report("one", 1), False)
    assert made.digest()["pi"].reported == report("one", 1)
    made.put("kedge/v1/d/pi/status", codec.encode(Status(online=True, boot_id="one", session=3)), False)
    change = made.digest()["pi"]
    assert change.reported == report("one", 1)
    assert change.memory.presence.session == 3
    made.written()
    assert made.digest() == {}


def test_after_a_break_nobody_is_there_until_told() -> None:
    made = inbox()
    birth = codec.encode(Status(online=True, boot_id="one", session=3))
    made.put("kedge/v1/d/pi/status", birth, True)
    assert made.digest()["pi"].memory.presence.online
    made.put_break()
    assert not made.digest()["pi"].memory.presence.online
    made.put("kedge/v1/d/pi/status", birth, True)
    assert made.digest()["pi"].memory.presence.online


@given(text=st.text())
def test_text_passes_and_half_a_pair_does_not(text: str) -> None:
    check_text(json.dumps({"reason": text}).encode(), where="here")
    for broken in ("\\ud800", "\\uDFFF", "\\udc00\\ud800"):
        with pytest.raises(MessageError, match="no Unicode"):
            check_text(b'{"reason": "' + broken.encode() + b'"}', where="here")


def test_one_kind_of_trouble_is_logged_seldom(caplog: pytest.LogCaptureFixture) -> None:
    seldom = SeldomLog(seconds=60)
    for _ in range(100):
        seldom.warning("a", "trouble with %s", "a")
    seldom.warning("b", "trouble with %s", "b")
    assert [record.getMessage() for record in caplog.records] == ["trouble with a", "trouble with b"]
    again = SeldomLog(seconds=0)
    again.warning("a", "trouble")
    again.warning("a", "trouble")
    assert len(caplog.records) == 4

"""Presence: births, wills and words in any order that a broker may bring them."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kedge.fleet.presence import Presence, after_status, after_word
from kedge_protocol.messages import Status


@dataclass(frozen=True)
class Life:
    """One connection of a device: boot, session, and whether it is the last and still stands."""

    boot: str
    session: int


@given(boots=st.lists(st.integers(1, 4), min_size=1, max_size=4), data=st.data())
def test_a_device_that_is_there_is_shown_there_however_late_its_old_wills_come(
    boots: list[int], data: st.DataObject
) -> None:
    lives = [Life(f"boot-{number}", session) for number, count in enumerate(boots) for session in range(1, count + 1)]
    late = list(lives[:-1])
    known = Presence()
    for life in lives:
        known = after_status(known, Status(online=True, boot_id=life.boot, session=life.session))
        born = [old for old in late if lives.index(old) < lives.index(life)]
        for old in data.draw(st.lists(st.sampled_from(born), max_size=3)) if born else []:
            known = after_status(known, Status(online=False, boot_id=old.boot, session=old.session))
        assert known == Presence(True, life.boot, life.session)
    last = lives[-1]
    gone = after_status(known, Status(online=False, boot_id=last.boot, session=last.session))
    assert not gone.online


def test_a_will_without_a_session_is_believed_for_its_own_boot_only() -> None:
    known = Presence(True, "b", 3)
    assert not after_status(known, Status(online=False, boot_id="b")).online
    assert after_status(known, Status(online=False, boot_id="a")).online


def test_whoever_speaks_is_there() -> None:
    # Only an old will was retained: a controller that starts then learns better from the first word.
    known = after_status(Presence(), Status(online=False, boot_id="old", session=1))
    assert not known.online
    known = after_word(known, "new")
    assert known == Presence(True, "new", 0)
    assert after_status(known, Status(online=False, boot_id="old", session=1)) == known
    assert not after_status(known, Status(online=False, boot_id="new", session=1)).online

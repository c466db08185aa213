"""Another device of one name is noticed; this device's own past is not taken for one."""

from __future__ import annotations

import pytest

from kedge_agent.name_conflict import FORGET_SECONDS, NameConflict

pytestmark = pytest.mark.device


def test_what_stood_there_before_this_device_spoke_may_be_its_own_past() -> None:
    listener = NameConflict("now")
    assert not listener.heard("before")
    assert listener.boot is None


def test_a_boot_of_others_after_this_device_spoke_is_another_device() -> None:
    listener = NameConflict("now", ["before"])
    assert not listener.heard("now")
    # The late will of an earlier boot, or a broker that came back with an old store.
    assert not listener.heard("before")
    assert listener.heard("other")
    assert listener.boot == "other"
    assert not listener.heard("other")


def test_one_that_is_not_heard_any_more_is_gone() -> None:
    listener = NameConflict("now")
    listener.heard("now")
    assert listener.heard("other")
    assert not listener.watch(1000.0)
    assert not listener.watch(1000.0 + FORGET_SECONDS - 1)
    listener.heard("other")
    assert not listener.watch(1000.0 + FORGET_SECONDS)
    assert listener.watch(1000.0 + 2 * FORGET_SECONDS)
    assert listener.boot is None
    assert listener.heard("other")

"""What memory has room for: what a served language model declares counts, whether it has taken it yet or not."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle
from tests.support.installed import install

from kedge_agent import room
from kedge_agent.room import DECLARED, Room
from kedge_agent.slots import ModelFolder, Serving
from kedge_protocol import memory
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import IncompatibleError

pytestmark = pytest.mark.device
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFolder:
    """A device of 1000 MiB, 600 of them free; this process plays the serving one: it holds 200 MiB, 100 of them without
    models, and has loaded one that declares 300."""
    monkeypatch.setattr(memory, "of_device", lambda: memory.DeviceMemory(1000 * MIB, 600 * MIB))
    monkeypatch.setattr(memory, "resident", lambda pid=None: 200 * MIB if pid in (None, os.getpid()) else None)
    monkeypatch.setattr(room, "_LOOK", 0.001)
    monkeypatch.setattr(room, "_FREED", 0.02)
    found = install(tmp_path, make_bundle(tmp_path))
    _say(found, {DECLARED: 300.0 * MIB})
    return found


def _say(folder: ModelFolder, figures: dict[str, float], error: str | None = None) -> None:
    current = folder.current()
    assert current is not None
    folder.write_serving(Serving(digest=current.digest, pid=os.getpid(), error=error, figures=figures))


def _needs(folder: ModelFolder, mib: int) -> BundleConfig:
    config = Layout(folder.state / "tiny-1.0").bundle("generic-cpu").config
    return replace(config, resources=replace(config.resources, memory_bytes=mib * MIB))


def test_what_is_promised_and_not_taken_yet_is_not_free(folder: ModelFolder) -> None:
    assert Room(folder.state).free() == (600 - 200) * MIB
    assert Room(folder.state, 700 * MIB).free() == (700 - 2 * 200 - 200) * MIB
    assert (Room(folder.state).total(), Room(folder.state, 500 * MIB).total()) == (1000 * MIB, 500 * MIB)
    _say(folder, {})
    assert Room(folder.state).free() == 600 * MIB


def test_a_bundle_that_fits_beside_the_old_one_makes_nothing_go(folder: ModelFolder) -> None:
    Room(folder.state).make(folder, _needs(folder, 400), lambda _: pytest.fail("it waited"))


def test_a_bundle_that_fits_in_the_place_of_the_old_one_waits_for_it(folder: ModelFolder) -> None:
    current, told = folder.current(), []
    assert current is not None

    def tell(words: str) -> None:
        told.append(words)
        assert folder.gives_way(current.digest)
        if len(told) == 3:
            _say(folder, {}, error="makes way")

    Room(folder.state).make(folder, _needs(folder, 401), tell)  # 400 are free, the old one declares 1
    assert told == ["version 1.0 makes way in memory"] * 3
    folder.take_back()
    assert not folder.gives_way(current.digest)
    folder.take_back()  # nothing to do


@pytest.mark.parametrize("served", [True, False])
def test_a_bundle_without_room_even_then_is_refused_with_the_numbers_and_the_old_one_stays(
    folder: ModelFolder, *, served: bool
) -> None:
    current = folder.current()
    assert current is not None
    if not served:
        folder.serving_file.unlink()
    free, more = (400, ", and version 1.0 would give back 1 MiB") if served else (600, "")
    words = f"tiny 1.0: needs 700 MiB of memory; {free} MiB of 1000 MiB are free for it{more}. Stop what takes"
    with pytest.raises(IncompatibleError, match=re.escape(words)):
        Room(folder.state).make(folder, _needs(folder, 700), lambda _: pytest.fail("it waited"))
    assert not folder.gives_way(current.digest)


def test_nothing_makes_way_for_a_shadow(folder: ModelFolder) -> None:
    current = folder.current()
    assert current is not None
    with pytest.raises(IncompatibleError, match="401 MiB of memory; 400 MiB of 1000 MiB are free for it"):
        Room(folder.state).make(folder, _needs(folder, 401), lambda _: pytest.fail("it waited"), beside=True)
    assert not folder.gives_way(current.digest)


def test_memory_that_others_took_meanwhile_is_a_refusal_too(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(_: str) -> None:
        _say(folder, {}, error="makes way")
        monkeypatch.setattr(memory, "of_device", lambda: memory.DeviceMemory(1000 * MIB, 300 * MIB))

    with pytest.raises(IncompatibleError, match=r"300 MiB of 1000 MiB are free for it without version 1\.0"):
        Room(folder.state).make(folder, _needs(folder, 401), tell)


def test_a_serving_process_that_died_is_not_waited_for(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SWITCH_SECONDS", 1e9)
    monkeypatch.setattr(memory, "resident", lambda pid=None: None if pid else 200 * MIB)
    Room(folder.state).make(folder, _needs(folder, 600), lambda _: pytest.fail("it waited"))


def test_memory_that_cannot_be_read_refuses_nothing(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "of_device", lambda: memory.DeviceMemory(0, 0))
    Room(folder.state).make(folder, _needs(folder, 700), lambda _: pytest.fail("it waited"))

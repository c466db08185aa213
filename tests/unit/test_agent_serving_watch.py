"""What the serving child writes becomes events; what a dead one wrote counts for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.update_world import make_release, stored

from kedge_agent.serving_watch import ServingWatch
from kedge_agent.slots import ModelFolder, Serving
from kedge_agent.update.events import Served

pytestmark = pytest.mark.device


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    store, bundle = stored(tmp_path, make_release({"model.bin": b"1"}))
    folder = ModelFolder(tmp_path, "digits")
    folder.switch(folder.assemble(bundle, store.blob_path))
    return folder


def current(folder: ModelFolder) -> str:
    slot = folder.current()
    assert slot is not None
    return slot.digest


def test_each_word_is_told_once(tmp_path: Path, folder: ModelFolder) -> None:
    watch, digest = ServingWatch(tmp_path, served_by_child=True), current(folder)
    assert watch.look() == []
    folder.write_serving(Serving(digest=digest, pid=1))
    assert watch.look() == [Served("digits", digest)]
    assert watch.look() == []
    folder.write_serving(Serving(digest=digest, pid=1, error="why"))
    assert watch.look() == [Served("digits", digest, "why")]


def test_a_word_of_another_bundle_is_not_of_the_current_one(tmp_path: Path, folder: ModelFolder) -> None:
    watch = ServingWatch(tmp_path, served_by_child=True)
    folder.write_serving(Serving(digest="sha256:" + "0" * 64, pid=1))
    assert watch.look() == []


def test_what_a_dead_child_said_is_forgotten(tmp_path: Path, folder: ModelFolder) -> None:
    watch, digest = ServingWatch(tmp_path, served_by_child=True), current(folder)
    folder.write_serving(Serving(digest=digest, pid=1))
    watch.child_died(1, "was killed by SIGSEGV")
    assert watch.look() == []
    assert folder.serving() is None
    watch.child_died(3, "was killed by SIGSEGV")
    (event,) = watch.look()
    assert event.error == "the serving process died 3 times in a row; it was killed by SIGSEGV"
    folder.write_serving(Serving(digest=digest, pid=2))
    assert watch.look() == [Served("digits", digest)]


def test_without_a_child_what_is_current_serves(tmp_path: Path, folder: ModelFolder) -> None:
    watch = ServingWatch(tmp_path, served_by_child=False)
    assert watch.look() == [Served("digits", current(folder))]
    assert watch.look() == []

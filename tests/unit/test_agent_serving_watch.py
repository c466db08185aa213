"""What the serving child tells becomes events; what a dead one told counts for nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.update_world import make_release, stored

from kedge_agent.serving.bundle_watch import ServingWatch
from kedge_agent.serving.status_pipe import StatusMessage, StatusReader, StatusWriter
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
    said: dict[str, Serving] = {}
    watch, digest = ServingWatch(tmp_path, said.get), current(folder)
    assert watch.look() == []
    said["digits"] = Serving(digest=digest, pid=1)
    assert watch.look() == [Served("digits", digest)]
    assert watch.look() == []
    said["digits"] = Serving(digest=digest, pid=1, error="why")
    assert watch.look() == [Served("digits", digest, "why")]


def test_a_word_of_another_bundle_is_not_of_the_current_one(tmp_path: Path, folder: ModelFolder) -> None:
    said = {"digits": Serving(digest="sha256:" + "0" * 64, pid=1)}
    assert ServingWatch(tmp_path, said.get).look() == []


def test_what_a_dead_child_wrote_is_forgotten(tmp_path: Path, folder: ModelFolder) -> None:
    folder.write_serving(Serving(digest=current(folder), pid=1))
    ServingWatch(tmp_path, {}.get).forget_all()
    assert folder.serving() is None


def test_without_a_child_what_is_current_serves(tmp_path: Path, folder: ModelFolder) -> None:
    watch = ServingWatch(tmp_path, None)
    assert watch.look() == [Served("digits", current(folder))]
    assert watch.look() == []


words = st.builds(
    StatusMessage,
    model=st.text(alphabet="abc", max_size=5),
    serving=st.none()
    | st.builds(
        Serving,
        digest=st.just("sha256:" + "0" * 64),
        pid=st.integers(1, 99),
        error=st.none() | st.text(max_size=3000),
        detail=st.none() | st.text(max_size=3000),
        figures=st.dictionaries(st.text(max_size=30), st.floats(0, 1e9), max_size=60),
    ),
)


@given(told=st.lists(words, max_size=10))
def test_what_the_child_tells_arrives_whole_or_shortened_and_never_torn(told: list[StatusMessage]) -> None:
    reading, writing = os.pipe()
    writer, reader = StatusWriter(writing), StatusReader(reading)
    try:
        heard = []
        for word in told:
            assert writer.send(word)
            heard += reader.listen()
        assert [word.model for word in heard] == [word.model for word in told]
        for word, said in zip(told, heard, strict=True):
            assert (word.serving is None) == (said.serving is None)
            if word.serving is not None and said.serving is not None:
                assert (word.serving.error is None) == (said.serving.error is None)
                assert said.serving.digest == word.serving.digest
    finally:
        reader.close()
        os.close(writing)


def test_an_agent_that_does_not_read_or_is_gone_does_not_hold_the_child_up() -> None:
    reading, writing = os.pipe()
    writer = StatusWriter(writing)
    while writer.send(StatusMessage()):
        pass
    os.close(reading)
    assert not writer.send(StatusMessage())
    os.close(writing)
    assert StatusWriter(None).send(StatusMessage())

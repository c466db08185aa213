"""A state folder of an older agent is upgraded at the start, and its models serve throughout."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from tests.support.update_world import make_release, stored

from kedge_agent import slots, state_format
from kedge_agent.slots import ModelFolder, Slot
from kedge_protocol.errors import KedgeError, StorageError

pytestmark = pytest.mark.device


def older(state: Path, *versions: str, files: dict[str, bytes] | None = None) -> ModelFolder:
    """A state folder as the agent before format 2 left it: two versions of a model, the last one current."""
    folder = ModelFolder(state, "digits")
    for version in versions:
        store, bundle = stored(state, make_release(files or {"model.bin": version.encode()}, version=version))
        folder.switch(folder.assemble(bundle, store.blob_path))
    for slot in folder.slots.iterdir():
        (slot / slots.MANIFEST_FILE).rename(slot / "bundle.json")
    return folder


def served(folder: ModelFolder) -> Slot:
    current = folder.current()
    assert current is not None
    return current


def test_manifests_are_renamed_once_and_every_slot_stays_what_it_was(tmp_path: Path) -> None:
    folder = older(tmp_path, "1.0", "2.0")
    before = folder.current(), folder.previous(), folder.generation()
    state_format.upgrade(tmp_path)
    assert (folder.current(), folder.previous(), folder.generation()) == before
    assert served(folder).bundle().config.version == "2.0"
    assert not list(tmp_path.rglob("bundle.json"))
    assert (tmp_path / "format").read_text() == "2\n"
    assert folder.roll_back() == before[1]
    stamp = (tmp_path / "format").stat().st_mtime_ns
    state_format.upgrade(tmp_path)
    assert (tmp_path / "format").stat().st_mtime_ns == stamp


def test_a_model_can_be_read_at_every_moment_of_the_upgrade(tmp_path: Path) -> None:
    folders = [older(tmp_path / str(number), "1.0") for number in range(20)]
    digest, stop, failures, read = served(folders[0]).digest, threading.Event(), [], 0

    def reader() -> None:
        nonlocal read
        while not stop.is_set():
            for folder in folders:
                try:
                    if served(folder).bundle().digest != digest:
                        failures.append("another bundle")
                except (OSError, KedgeError, AssertionError) as error:
                    failures.append(repr(error))
                read += 1

    thread = threading.Thread(target=reader)
    thread.start()
    for number in range(len(folders)):
        state_format.upgrade(tmp_path / str(number))
    stop.set()
    thread.join()
    assert failures == []
    assert read > 0


def test_an_upgrade_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    folder = older(tmp_path, "1.0", "2.0")
    one = served(folder).folder
    (one / "bundle.json").rename(one / slots.MANIFEST_FILE)  # power cut between two renames: no format file yet
    state_format.upgrade(tmp_path)
    assert not list(tmp_path.rglob("bundle.json"))
    assert served(folder).bundle().config.version == "2.0"


def test_a_file_of_the_bundle_is_never_replaced(tmp_path: Path) -> None:
    folder = older(tmp_path, "1.0")
    (served(folder).folder / "manifest.json").write_bytes(b"of the model")
    state_format.upgrade(tmp_path)
    assert (served(folder).folder / "manifest.json").read_bytes() == b"of the model"
    assert served(folder).bundle().config.version == "1.0"


def test_a_disk_that_cannot_be_written_serves_in_the_older_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = older(tmp_path, "1.0")

    def refuse(self: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    state_format.upgrade(tmp_path)
    assert served(folder).bundle().config.version == "1.0"
    assert not (tmp_path / "format").exists()


@pytest.mark.parametrize(("content", "problem"), [("3\n", "this agent knows 2"), ("two", "not a number")])
def test_a_newer_or_damaged_format_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "format").write_text(content)
    with pytest.raises(StorageError, match=problem):
        state_format.upgrade(tmp_path)

"""A model's folder: slots appear whole, the current one changes in one step."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.update_world import make_release, stored
from tests.support.waiting import wait_for

from kedge_agent.slots import ModelFolder, Serving, model_names
from kedge_protocol.errors import BundleError, ConfigError

pytestmark = pytest.mark.device


def test_a_slot_links_the_blobs_and_tells_its_bundle(tmp_path: Path) -> None:
    release = make_release({"model.bin": b"weights", "labels.txt": b"a"})
    store, bundle = stored(tmp_path, release)
    folder = ModelFolder(tmp_path, "digits")
    assert folder.current() is None
    slot = folder.assemble(bundle, store.blob_path)
    assert folder.current() is None
    folder.switch(slot)
    current = folder.current()
    assert current is not None
    assert current.digest == release.digest
    assert current.bundle().config.version == "1.0"
    assert (current.folder / "model.bin").read_bytes() == b"weights"
    assert (current.folder / "model.bin").stat().st_nlink == 2
    assert model_names(tmp_path) == ["digits"]


def test_the_slot_before_is_kept_and_the_generation_grows_in_place(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, "digits")
    slots = []
    for version in ("1.0", "2.0", "3.0"):
        store, bundle = stored(tmp_path, make_release({"model.bin": version.encode()}, version=version))
        slots.append(folder.assemble(bundle, store.blob_path))
        folder.switch(slots[-1])
        if version == "1.0":
            mapped = os.open(folder.generation_file, os.O_RDONLY)
            first = os.pread(mapped, 8, 0)
    assert int.from_bytes(os.pread(mapped, 8, 0), "little") == folder.generation() > int.from_bytes(first, "little")
    os.close(mapped)
    folder.prune()
    assert folder.current() == slots[2]
    assert folder.previous() == slots[1]
    assert not slots[0].folder.exists()
    assert folder.roll_back() == slots[1]
    assert (folder.current(), folder.previous()) == (slots[1], None)
    assert not slots[2].folder.exists()


def test_rolling_back_without_a_previous_slot_leaves_nothing(tmp_path: Path) -> None:
    store, bundle = stored(tmp_path, make_release({"model.bin": b"1"}))
    folder = ModelFolder(tmp_path, "digits")
    folder.switch(folder.assemble(bundle, store.blob_path))
    assert folder.roll_back() is None
    assert folder.current() is None
    assert model_names(tmp_path) == []


def test_switching_to_the_current_slot_changes_nothing(tmp_path: Path) -> None:
    store, bundle = stored(tmp_path, make_release({"model.bin": b"1"}))
    folder = ModelFolder(tmp_path, "digits")
    slot = folder.assemble(bundle, store.blob_path)
    folder.switch(slot)
    generation = folder.generation()
    folder.switch(folder.assemble(bundle, store.blob_path))
    assert folder.generation() == generation
    assert folder.previous() is None


def test_a_damaged_slot_is_made_anew(tmp_path: Path) -> None:
    store, bundle = stored(tmp_path, make_release({"model.bin": b"1"}))
    folder = ModelFolder(tmp_path, "digits")
    slot = folder.assemble(bundle, store.blob_path)
    (slot.folder / "model.bin").unlink()
    folder.assemble(bundle, store.blob_path)
    assert (slot.folder / "model.bin").read_bytes() == b"1"


def test_names_that_slots_keep_and_names_that_lead_elsewhere_are_refused(tmp_path: Path) -> None:
    store, bundle = stored(tmp_path, make_release({"bundle.json": b"1"}))
    with pytest.raises(BundleError, match="keep for themselves"):
        ModelFolder(tmp_path, "digits").assemble(bundle, store.blob_path)
    for name in ("..", "a/b", "", ".x"):
        with pytest.raises(ConfigError):
            ModelFolder(tmp_path, name)


def test_what_the_serving_process_says_is_read_back(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, "digits")
    assert folder.serving() is None
    folder.path.mkdir(parents=True)
    folder.write_serving(Serving(digest="sha256:x", pid=7, error="why"))
    assert folder.serving() == Serving(digest="sha256:x", pid=7, error="why")
    folder.serving_file.write_bytes(b"{")
    assert folder.serving() is None


SWITCHER = """
import sys
from pathlib import Path
from tests.support.update_world import make_release, stored
from kedge_agent.slots import ModelFolder
folder = ModelFolder(Path(sys.argv[1]), "digits")
made = []
for version in ("1.0", "2.0"):
    store, bundle = stored(Path(sys.argv[1]), make_release({"model.bin": version.encode()}, version=version))
    made.append((bundle, store))
print("ready", flush=True)
while True:
    for bundle, store in made:
        folder.switch(folder.assemble(bundle, store.blob_path))
        folder.prune()
"""


def test_a_switcher_killed_at_any_point_leaves_a_whole_current_slot(tmp_path: Path) -> None:
    chance = random.Random(5)
    folder = ModelFolder(tmp_path, "digits")
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", SWITCHER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        wait_for(folder.current)
        time.sleep(chance.uniform(0.0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        current = folder.current()
        assert current is not None
        bundle = current.bundle()
        assert (current.folder / "model.bin").read_bytes() == bundle.config.version.encode()
    folder.prune()
    names = {path.name for path in folder.slots.iterdir()}
    assert names <= {slot.folder.name for slot in (folder.current(), folder.previous()) if slot is not None}
